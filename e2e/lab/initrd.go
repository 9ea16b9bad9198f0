package main

import (
	"bufio"
	"bytes"
	"debug/elf"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"keybroker/e2e/cpio"
)

//go:embed host-init
var hostInit []byte

//go:embed guest-init
var guestInit []byte

// hostModules are what the host VM loads at once; udev and modprobe find the others in its tree.
var hostModules = []string{
	"9p", "9pnet_virtio", "overlay", "autofs4",
	"kvm_amd", "kvm_intel", "vhost_vsock", "vsock_loopback", "vsock_diag",
	"tcp_diag", "unix_diag", "algif_hash", "algif_skcipher", "dm-crypt", "loop", "tun",
}

// guestModules are what a guest loads.
var guestModules = []string{"virtio_blk", "vmw_vsock_virtio_transport", "vsock_loopback", "button", "evdev", "dm-crypt", "xts", "aesni-intel", "algif_skcipher", "tsm"}

// guestPrograms are what a guest has besides busybox, each with its shared libraries.
var guestPrograms = []string{"usr/sbin/cryptsetup", "usr/sbin/dmsetup", "usr/bin/keyctl", "usr/bin/socat"}

// libgcc is loaded by libpthread when cryptsetup's threads end, and no program names it.
const libgcc = "libgcc_s.so.1"

// initrd is an initramfs in the making.
type initrd struct {
	cpio.Archive
	tree    string   // the cached folder that its programs and modules come from
	modules []string // those it has, in the order in which they are loaded
}

func newInitrd(tree string, init []byte) *initrd {
	r := &initrd{tree: tree}
	for _, dir := range []string{"bin", "dev", "etc", "lib", "new", "proc", "ro", "run", "rw", "sbin", "sys", "tmp"} {
		r.AddDir(dir)
	}
	r.Add("init", 0o755, init)
	return r
}

func (r *initrd) addFile(path, source string) error {
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	r.Add(path, 0o755, content)
	return nil
}

// hostInitrd is the initramfs of the host VM.
func hostInitrd(tree string) ([]byte, error) {
	r := newInitrd(tree, hostInit)
	if err := r.addFile("bin/busybox", filepath.Join(tree, "tree/bin/busybox")); err != nil {
		return nil, err
	}
	if err := r.addModules(hostModules); err != nil {
		return nil, err
	}
	return r.Bytes(), nil
}

// guestInitrd is what the initramfs of every guest begins with; agent may be missing. The kernel unpacks archives that
// follow one another, so a guest's own files are appended as a second one.
func guestInitrd(tree, agent string) ([]byte, error) {
	r := newInitrd(tree, guestInit)
	if err := r.addFile("bin/busybox", filepath.Join(tree, "tree/bin/busybox")); err != nil {
		return nil, err
	}
	for _, program := range guestPrograms {
		if err := r.addProgram(program); err != nil {
			return nil, err
		}
	}
	if err := r.addLibrary(libgcc); err != nil {
		return nil, err
	}
	if err := r.addModules(guestModules); err != nil {
		return nil, err
	}
	r.Add("etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"))
	r.Add("etc/group", 0o644, []byte("root:x:0:\nuser:x:1000:\n"))
	if _, err := os.Stat(agent); err == nil {
		if err := r.addFile("bin/keybroker-agent", agent); err != nil {
			return nil, err
		}
	}
	return r.Bytes(), nil
}

// addProgram adds a program of the tree as /bin/NAME, with its loader and libraries.
func (r *initrd) addProgram(program string) error {
	source := filepath.Join(r.tree, "tree", program)
	if err := r.addFile(strings.TrimPrefix(program, "usr/"), source); err != nil {
		return err
	}
	if err := r.addFile("lib64/ld-linux-x86-64.so.2", filepath.Join(r.tree, "tree/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")); err != nil {
		return err
	}
	return r.addLibraries(source)
}

func (r *initrd) addLibraries(source string) error {
	object, err := elf.Open(source)
	if err != nil {
		return err
	}
	defer object.Close()
	names, err := object.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("reading what %s needs: %w", source, err)
	}
	for _, name := range names {
		if err := r.addLibrary(name); err != nil {
			return err
		}
	}
	return nil
}

func (r *initrd) addLibrary(name string) error {
	path := "lib/x86_64-linux-gnu/" + name
	if r.Has(path) || strings.HasPrefix(name, "ld-linux") {
		return nil
	}
	// the tree's own links are relative, so they are good from outside it
	source := filepath.Join(r.tree, "tree/usr", path)
	if err := r.addFile(path, source); err != nil {
		return err
	}
	return r.addLibraries(source)
}

// modulesDir is the folder of the kernel's modules; its last element is the kernel's version.
func modulesDir(tree string) string {
	found, err := filepath.Glob(filepath.Join(tree, "tree/usr/lib/modules/*"))
	if err != nil || len(found) != 1 {
		return filepath.Join(tree, "no-kernel")
	}
	return found[0]
}

// addModules adds modules and those that they depend on, unpacked, and their order as lib/order.
func (r *initrd) addModules(names []string) error {
	dependencies, err := readDependencies(filepath.Join(modulesDir(r.tree), "modules.dep"))
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := r.addModule(strings.ReplaceAll(name, "-", "_"), dependencies); err != nil {
			return err
		}
	}
	r.Add("lib/order", 0o644, []byte(strings.Join(r.modules, "\n")+"\n"))
	return nil
}

func (r *initrd) addModule(name string, dependencies map[string][]string) error {
	paths, ok := dependencies[name]
	if !ok {
		return fmt.Errorf("the kernel has no module %s", name)
	}
	// modules.dep names a module first and what it needs most at the end
	for i := len(paths) - 1; i >= 0; i-- {
		file := strings.TrimSuffix(filepath.Base(paths[i]), ".xz")
		if r.Has("lib/" + file) {
			continue
		}
		content, err := exec.Command("xz", "-dc", filepath.Join(modulesDir(r.tree), paths[i])).Output()
		if err != nil {
			return fmt.Errorf("unpacking %s: %w", paths[i], err)
		}
		r.Add("lib/"+file, 0o644, content)
		r.modules = append(r.modules, file)
	}
	return nil
}

// readDependencies reads depmod's modules.dep: module name to its own path and those it needs.
func readDependencies(path string) (map[string][]string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	dependencies := map[string][]string{}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		module, needs, _ := strings.Cut(lines.Text(), ":")
		name, _, _ := strings.Cut(filepath.Base(module), ".")
		dependencies[strings.ReplaceAll(name, "-", "_")] = append([]string{module}, strings.Fields(needs)...)
	}
	return dependencies, lines.Err()
}
