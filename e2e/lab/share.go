package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/term"
)

// share is the folder that the host VM reads and that goes with the run: a copy, so that nothing that is built or edited
// during a run changes it.
func (j *job) share() string { return filepath.Join(j.dir, "share") }

// shared are the parts of the project that the host VM sees below /share; the programs may be missing.
var shared = []string{"Makefile", "bin", "deploy", "e2e"}

// fillShare copies the project's programs and scripts, makes the initramfs of host VM and guests, and writes the job.
func (j *job) fillShare(tree string) error {
	for _, name := range shared {
		if err := copyInto(filepath.Join(j.share(), name), name); err != nil {
			return fmt.Errorf("copying for the host VM: %w", err)
		}
	}
	host, err := hostInitrd(tree)
	if err != nil {
		return fmt.Errorf("making the host VM's initramfs: %w", err)
	}
	guest, err := guestInitrd(tree, "bin/keybroker-agent")
	if err != nil {
		return fmt.Errorf("making the guests' initramfs: %w", err)
	}
	files := map[string][]byte{"host.cpio": host, "guest.cpio": guest, "job": []byte(j.script())}
	if j.mode == "test" {
		if files["tests"], err = listTests(j.tests); err != nil {
			return err
		}
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(j.share(), name), content, 0o644); err != nil {
			return err
		}
	}
	err = copyInto(filepath.Join(j.share(), "capabilities"), capabilities(tree))
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// script is what the host VM's lab.service reads: the job in bash's words.
func (j *job) script() string {
	columns, rows, err := term.GetSize(int(os.Stdin.Fd()))
	if err != nil || columns == 0 {
		columns, rows = 80, 24
	}
	return fmt.Sprintf("mode=%s\ncommand=%s\nexport TERM=%s\nrows=%d columns=%d\n",
		j.mode, quoteAll([]string{j.command}), quoteAll([]string{os.Getenv("TERM")}), rows, columns)
}

// copyInto copies a file or a folder. Text that is not the project's, such as Go code, does no harm.
func copyInto(target, source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.CopyFS(target, os.DirFS(source))
	}
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	return os.WriteFile(target, content, info.Mode().Perm())
}

// capabilities is the cached copy of what libvirt found out about QEMU, which takes it seconds in every new host VM. libvirt
// itself decides whether it still holds.
func capabilities(tree string) string { return filepath.Join(tree, "capabilities") }

// keepCapabilities puts what the host VM's libvirt found out anew into the cache.
func keepCapabilities(tree, out string) error {
	found := filepath.Join(out, ".capabilities")
	if _, err := os.Stat(found); err != nil {
		return nil
	}
	defer os.RemoveAll(found)
	if err := os.RemoveAll(capabilities(tree)); err != nil {
		return err
	}
	err := os.Rename(found, capabilities(tree))
	if os.IsExist(err) {
		return nil // another run was faster
	}
	return err
}

// printTail prints the last lines of a file.
func printTail(w io.Writer, path string, count int) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	var tail []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		tail = append(tail, strings.TrimRight(lines.Text(), "\r"))
		tail = tail[max(0, len(tail)-count):]
	}
	for _, line := range tail {
		fmt.Fprintf(w, "  %s\n", line)
	}
}
