package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"keybroker/e2e/domain"
)

// hookLog is where logHook's hook writes.
const hookLog = "/run/lab-hook.log"

// logHook installs a libvirt hook that logs how it is called.
func logHook(t *testing.T) {
	t.Helper()
	const path = "/etc/libvirt/hooks/qemu.d/lab-log"
	script := "#!/bin/sh\ncat >/dev/null\necho \"$1 $2 $3\" >>" + hookLog + "\n"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

// hookCalls returns the calls since the last time, without the guest's name.
func hookCalls(t *testing.T, name string) []string {
	t.Helper()
	content, err := os.ReadFile(hookLog)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(hookLog); err != nil {
		t.Fatal(err)
	}
	var calls []string
	for line := range strings.Lines(string(content)) {
		if call, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			calls = append(calls, call)
		}
	}
	return calls
}

// TestHost holds what the other tests build on: a guest boots under libvirt, can be driven, and talks over vhost-vsock with the
// host.
func TestHost(t *testing.T) {
	ctx := inLab(t)
	logHook(t)
	sh(ctx, t, "systemctl restart libvirtd") // which sees a new folder of hooks when it starts
	g := define(ctx, t, domain.Spec{Name: "lab", UUID: "55555555-5555-4555-8555-555555555555"})
	began := time.Now()
	g.start()
	t.Logf("start to booted: %v", time.Since(began))

	t.Run("hooks are called", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		if got, want := fmt.Sprint(hookCalls(t, g.Name)), "[prepare begin start begin started begin]"; got != want {
			t.Errorf("start called the hook with %s, want %s", got, want)
		}
	})
	t.Run("commands run as root and as a user", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		if got := g.run("id -u"); got != "0" {
			t.Errorf("root's id is %q", got)
		}
		if got := g.runAs("user", "id -u; printf x"); got != "1000\nx" {
			t.Errorf("the user's id is %q", got)
		}
		if result, err := g.Run(step(ctx, t), "user", "echo no >/etc/passwd"); err != nil || result.Status == 0 {
			t.Errorf("the user wrote root's file: %+v, %v", result, err)
		}
	})
	t.Run("vsock connects host and guest", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		g.run("socat VSOCK-LISTEN:7000,fork EXEC:'echo hello' >/dev/null 2>&1 &")
		if got := dialGuest(t, g, 7000); got != "hello\n" {
			t.Errorf("the guest said %q", got)
		}
		listener, err := vsock.ListenContextID(vsock.Host, 7001, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			if conn, err := listener.Accept(); err == nil {
				fmt.Fprintf(conn, "from the host to %v", conn.RemoteAddr())
				conn.Close()
			}
		}()
		if got := g.run("socat -u VSOCK-CONNECT:2:7001 -"); !strings.HasPrefix(got, "from the host") {
			t.Errorf("the host said %q", got)
		}
	})
	t.Run("its disk can be formatted and opened", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		g.run("head -c 32 /dev/urandom >/tmp/key; cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vdb /tmp/key")
		g.run("cryptsetup open --key-file /tmp/key /dev/vdb data && dmsetup table data | grep -q crypt && ls /dev/mapper/data")
	})
	t.Run("the TPM answers", func(t *testing.T) {
		if got := sh(ctx, t, "tpm2_pcrread sha256:7"); !strings.Contains(got, "7 : 0x") {
			t.Errorf("PCR 7 is %q", got)
		}
	})
	t.Run("an unprivileged user reads libvirt", func(t *testing.T) {
		got := sh(ctx, t, "cd / && HOME=/tmp XDG_CACHE_HOME=/tmp/virsh setpriv --reuid nobody --regid nogroup --clear-groups virsh -r -c qemu:///system domstate lab")
		if got != "running" {
			t.Errorf("nobody sees the guest as %q", got)
		}
	})
}

// dialGuest reads what the guest says on a vsock port, which may not be listened on yet.
func dialGuest(t *testing.T, g *guest, port uint32) string {
	t.Helper()
	cid, err := g.CID(g.ctx)
	if err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	ctx := step(g.ctx, t)
	for {
		conn, err := vsock.Dial(cid, port, nil)
		if err == nil {
			defer conn.Close()
			conn.SetReadDeadline(time.Now().Add(guestLimit))
			said, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			return string(said)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("connecting to port %d of %s: %v", port, g.Name, err)
		}
	}
}
