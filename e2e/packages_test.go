package e2e

import (
	"os/exec"
	"strings"
	"testing"
)

// TestPackages runs the tests of packages whose real thing may be only here, such as dm-crypt, a libvirtd that may be stopped, or
// a new kernel. Elsewhere they may skip, here they may not.
func TestPackages(t *testing.T) {
	ctx := inLab(t)
	sh(ctx, t, "modprobe -a loop dm-crypt; systemctl start libvirtd.service; pidof libvirtd >/run/libvirtd.pid")
	for name, command := range map[string]string{
		"volumes on dm-crypt":  "/share/bin/sink.test -test.v",
		"libvirt, and stopped": "LIBVIRT_SOCKET=/run/libvirt/libvirt-sock LIBVIRT_PIDFILE=/run/libvirtd.pid /share/bin/libvirt.test -test.v -test.run Real",
		"agent on vsock":       "/share/bin/guest-agent.test -test.v -test.run Deadline",
		"callers":              "/share/bin/caller.test -test.v",
		"audit on a full disk": "/share/bin/audit.test -test.v -test.run FullDisk",
		"secret pages":         "/share/bin/derive.test -test.v -test.run 'Page|HolderEquals|HandOver'",
	} {
		t.Run(name, func(t *testing.T) {
			octets, err := exec.CommandContext(ctx, "bash", "-c", "cd $(mktemp -d) && CI=true timeout 300 env "+command).CombinedOutput()
			out := string(octets)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if strings.Contains(out, "--- SKIP") || !strings.Contains(out, "--- PASS") {
				t.Errorf("a test was skipped, or none ran:\n%s", out)
			}
		})
	}
}
