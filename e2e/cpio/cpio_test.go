package cpio

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"keybroker/internal/need"
)

// TestUnpacks has cpio unpack an archive.
func TestUnpacks(t *testing.T) {
	need.Program(t, "cpio")
	var a Archive
	a.Add("etc/deep/three", 0o640, []byte("abc"))
	a.Add("init", 0o755, bytes.Repeat([]byte("x"), 4097))
	a.AddDir("proc")
	archive := a.Bytes()
	if len(archive)%4 != 0 {
		t.Errorf("the length %d is no multiple of four", len(archive))
	}
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-i", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	if content, err := os.ReadFile(filepath.Join(dir, "etc/deep/three")); err != nil || string(content) != "abc" {
		t.Errorf("etc/deep/three = %q, %v", content, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "init")); err != nil || info.Size() != 4097 || info.Mode().Perm() != 0o755 {
		t.Errorf("init = %v, %v", info, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "proc")); err != nil || !info.IsDir() {
		t.Errorf("proc = %v, %v", info, err)
	}
}
