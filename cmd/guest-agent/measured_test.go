//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fileOn makes a file in a folder and says on which device it is, as mountinfo does.
func fileOn(t *testing.T, dir string) (f *os.File, device string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "agent.toml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return f, fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
}

// mounts writes a mountinfo.
func mounts(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mountinfo")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Only the kernel's first root counts: another tmpfs may hold what the host gave, as systemd's credentials do.
func TestInInitramfs(t *testing.T) {
	f, device := fileOn(t, memoryDir(t))
	root := "1 1 " + device + " / / rw - rootfs rootfs rw,size=1k"
	run := "29 1 " + device + " / /run rw,nosuid shared:5 - tmpfs tmpfs rw"
	for name, c := range map[string]struct {
		lines []string
		want  string // "": it is in the initramfs
	}{
		"initramfs":             {[]string{"20 1 0:99 / /proc rw - proc proc rw", root}, ""},
		"another tmpfs":         {[]string{"1 1 0:2 / / rw - rootfs none rw", run}, "it is on /run, tmpfs, not in the initramfs"},
		"both, which cannot be": {[]string{root, run}, "/run"},
		"nowhere":               {[]string{"1 1 0:2 / / rw - rootfs none rw"}, "type 0x1021994"},
		"nothing to read":       {[]string{"1 1", device, "- rootfs"}, "type 0x1021994"},
	} {
		err := inInitramfs(f, mounts(t, c.lines...))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
	if err := inInitramfs(f, "/nonexistent"); err == nil {
		t.Error("without mountinfo: in the initramfs")
	}
}

// What is on a disk is not in the initramfs, whatever mountinfo is made to say.
func TestADiskIsNotMeasured(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "keybroker-agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f, device := fileOn(t, dir)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC {
		t.Skipf("needs a disk at /var/tmp, not a file system in memory: %v", err)
	}
	for _, mountinfo := range []string{mountsOf, mounts(t, "1 1 "+device+" / / rw - rootfs rootfs rw")} {
		if err := inInitramfs(f, mountinfo); err == nil {
			t.Errorf("a file on a disk, by %s: in the initramfs", mountinfo)
		}
	}
}

func TestWhereAConfigurationMayBe(t *testing.T) {
	sign := filepath.Join(t.TempDir(), "sev-guest")
	if err := os.WriteFile(sign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	disk := &source{name: "/etc/keybroker/agent.toml", unmeasured: fmt.Errorf("it is on /, ext4, not in the initramfs")}
	initramfs, line := &source{name: "/etc/keybroker/agent.toml"}, &source{name: "the kernel's command line", cmdline: true}
	plain, confidential := []string{"/nonexistent"}, []string{"/nonexistent", sign}
	for name, c := range map[string]struct {
		from  *source
		tier  string
		signs []string
		want  string // "": allowed
	}{
		"vm, disk":                           {disk, "vm", plain, ""},
		"vm, disk, confidential machine":     {disk, "vm", confidential, "a confidential machine (" + sign + " is there)"},
		"vm, initramfs, confidential":        {initramfs, "vm", confidential, ""},
		"snp, disk":                          {disk, "snp", plain, `/etc/keybroker/agent.toml: it is on /, ext4, not in the initramfs: tier "snp" takes`},
		"snp, disk, confidential machine":    {disk, "snp", confidential, `tier "snp"`},
		"snp, initramfs":                     {initramfs, "snp", confidential, ""},
		"snp, command line":                  {line, "snp", confidential, ""},
		"snp, command line, no sign of sevs": {line, "snp", nil, ""},
	} {
		err := c.from.check(c.tier, c.signs)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}

// The program itself: in tier snp it does not even begin with a file on a disk; -check, on the machine that builds the image, does.
func TestSNPConfigOnADisk(t *testing.T) {
	config := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(config, []byte(strings.Replace(goodConfig, `"vm"`, `"snp"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if exit, out := program(t, "-config", config, "-check"); exit != exitOK {
		t.Errorf("-check: exit status %d:\n%s", exit, out)
	}
	state := filepath.Join(t.TempDir(), "state")
	exit, out := program(t, "-config", config, "-state-dir", state)
	if exit != exitUsage || !strings.Contains(out, "not in the initramfs") || strings.Count(out, "\n") != 1 {
		t.Errorf("exit status %d:\n%s", exit, out)
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("it began")
	}
}
