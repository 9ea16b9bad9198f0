// Package cpio writes archives that the kernel takes as initramfs, in the format newc.
//
// See Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
package cpio

import (
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"slices"
)

// Archive is an archive in the making. Its zero value is empty and ready to use. It is not safe for concurrent use.
type Archive struct {
	files map[string]file
}

type file struct {
	mode    fs.FileMode
	content []byte
}

// Add adds a file of root's, and the folders that it lies in. A path that is there already is replaced.
func (a *Archive) Add(name string, mode fs.FileMode, content []byte) {
	a.AddDir(path.Dir(name))
	a.files[name] = file{mode.Perm(), content}
}

// AddDir adds a folder and those that it lies in.
func (a *Archive) AddDir(name string) {
	if a.files == nil {
		a.files = map[string]file{}
	}
	for ; name != "."; name = path.Dir(name) {
		a.files[name] = file{mode: fs.ModeDir | 0o755}
	}
}

// Has says whether a path is in the archive.
func (a *Archive) Has(name string) bool {
	_, ok := a.files[name]
	return ok
}

// Bytes returns the archive. Its length is a multiple of four, so that another can follow it: the kernel unpacks archives
// one after the other.
func (a *Archive) Bytes() []byte {
	names := make([]string, 0, len(a.files))
	for name := range a.files {
		names = append(names, name)
	}
	slices.Sort(names) // a folder before what is in it
	var out bytes.Buffer
	for i, name := range names {
		write(&out, i+1, name, a.files[name])
	}
	write(&out, 0, "TRAILER!!!", file{})
	return out.Bytes()
}

// types of files in st_mode
const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

func write(out *bytes.Buffer, inode int, name string, f file) {
	mode := uint32(f.mode.Perm()) | modeFile
	if f.mode.IsDir() {
		mode = uint32(f.mode.Perm()) | modeDir
	}
	// ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	fmt.Fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, mode, 0, 0, 1, 0, len(f.content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad(out)
	out.Write(f.content)
	pad(out)
}

func pad(out *bytes.Buffer) {
	for out.Len()%4 != 0 {
		out.WriteByte(0)
	}
}
