//go:build linux

// Package tsmfs is a file system in the place of /sys/kernel/config/tsm/report, for tests in guests without the hardware: it
// behaves as Linux' own does (Documentation/ABI/testing/configfs-tsm-report), so that a program needs no change. No program
// that ships links it.
package tsmfs

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// A Platform is what makes the reports.
type Platform struct {
	// Provider is the driver's name, "sev_guest". Without one there is no driver: no report can be begun.
	Provider string
	// Report makes a report with this REPORT_DATA, as outblob gives it, and the host's certificates, as auxblob does. It may
	// be called at the same time for several entries. level is the VMPL that was asked for; -1: none was.
	Report func(data []byte, level int) (out, aux []byte, err error)
}

// inblobSize is how much an entry takes as inblob (TSM_REPORT_INBLOB_MAX).
const inblobSize = 64

// Mount mounts the file system on a folder, until the returned function is called. It needs /dev/fuse, and CAP_SYS_ADMIN.
func Mount(dir string, p Platform) (unmount func() error, err error) {
	never := time.Duration(0) // the kernel caches nothing
	server, err := fs.Mount(dir, &root{platform: p}, &fs.Options{
		MountOptions: fuse.MountOptions{FsName: "tsm", Name: "tsm", DirectMountStrict: true},
		EntryTimeout: &never, AttrTimeout: &never, NegativeTimeout: &never,
	})
	if err != nil {
		return nil, fmt.Errorf("mounting a platform on %s: %w", dir, err)
	}
	return server.Unmount, nil
}

// root is the folder in which entries are made.
type root struct {
	fs.Inode
	platform Platform
}

var (
	_ fs.NodeMkdirer = (*root)(nil)
	_ fs.NodeRmdirer = (*root)(nil)
)

// Mkdir begins a report.
func (r *root) Mkdir(ctx context.Context, _ string, _ uint32, _ *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if r.platform.Provider == "" {
		return nil, syscall.ENXIO
	}
	e := &entry{platform: r.platform, level: -1}
	dir := r.NewInode(ctx, e, fs.StableAttr{Mode: syscall.S_IFDIR})
	return dir, 0
}

// Rmdir takes an entry with all that is in it away, as configfs does.
func (r *root) Rmdir(_ context.Context, name string) syscall.Errno {
	if r.GetChild(name) == nil {
		return syscall.ENOENT
	}
	return 0
}

// entry is one report in the making.
type entry struct {
	fs.Inode
	platform Platform

	mu       sync.Mutex
	data     []byte
	level    int
	written  uint64 // generation
	made     uint64 // the generation that out and aux are of
	out, aux []byte
}

var _ fs.NodeOnAdder = (*entry)(nil)

// OnAdd fills an entry with its attributes.
func (e *entry) OnAdd(ctx context.Context) {
	for name, a := range map[string]*attribute{
		"inblob": {write: e.setData}, "privlevel": {write: e.setLevel},
		"generation": {read: e.generation}, "provider": {read: e.provider}, "privlevel_floor": {read: e.floor},
		"outblob": {read: func() ([]byte, syscall.Errno) { return e.blob(&e.out) }},
		"auxblob": {read: func() ([]byte, syscall.Errno) { return e.blob(&e.aux) }},
	} {
		e.AddChild(name, e.NewPersistentInode(ctx, a, fs.StableAttr{Mode: syscall.S_IFREG}), false)
	}
}

func (e *entry) setData(b []byte) syscall.Errno {
	if len(b) == 0 || len(b) > inblobSize {
		return syscall.EINVAL
	}
	return e.set(func() { e.data = append([]byte(nil), b...) })
}

func (e *entry) setLevel(b []byte) syscall.Errno {
	level, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 2)
	if err != nil {
		return syscall.EINVAL
	}
	return e.set(func() { e.level = int(level) })
}

func (e *entry) set(change func()) syscall.Errno {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
	e.written++
	return 0
}

func (e *entry) generation() ([]byte, syscall.Errno) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return fmt.Appendln(nil, e.written), 0
}

func (e *entry) provider() ([]byte, syscall.Errno) { return []byte(e.platform.Provider + "\n"), 0 }

func (e *entry) floor() ([]byte, syscall.Errno) { return []byte("0\n"), 0 }

// blob makes the report anew if something was written since the last one. Meanwhile the entry is not locked, so that it may be
// written to: that shows in the generation.
func (e *entry) blob(which *[]byte) ([]byte, syscall.Errno) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.data == nil {
		return nil, syscall.EINVAL
	}
	if e.made != e.written {
		generation, data, level := e.written, e.data, e.level
		e.mu.Unlock()
		out, aux, err := e.platform.Report(data, level)
		e.mu.Lock()
		if err != nil {
			return nil, fs.ToErrno(err)
		}
		e.out, e.aux, e.made = out, aux, generation
	}
	return *which, 0
}

// attribute is a file. What it holds is read whole when it is opened.
type attribute struct {
	fs.Inode
	read  func() ([]byte, syscall.Errno)
	write func([]byte) syscall.Errno
}

var (
	_ fs.NodeOpener    = (*attribute)(nil)
	_ fs.NodeGetattrer = (*attribute)(nil)
	_ fs.NodeSetattrer = (*attribute)(nil)
)

// Getattr says who may do what; the size is not known before it is read.
func (a *attribute) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o444
	if a.write != nil {
		out.Mode = 0o200
	}
	return 0
}

// Setattr takes the truncation that comes with opening for writing.
func (a *attribute) Setattr(ctx context.Context, f fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return a.Getattr(ctx, f, out)
}

// Open gives a handle that bypasses the kernel's cache.
func (a *attribute) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	reading := flags&syscall.O_ACCMODE == syscall.O_RDONLY
	if reading && a.read == nil || !reading && a.write == nil {
		return nil, 0, syscall.EACCES
	}
	return &handle{attribute: a}, fuse.FOPEN_DIRECT_IO, 0
}

// handle is an attribute that is open.
type handle struct {
	attribute *attribute
	mu        sync.Mutex
	content   []byte
	got       bool
}

var (
	_ fs.FileReader = (*handle)(nil)
	_ fs.FileWriter = (*handle)(nil)
)

// Read reads what the attribute held when the first octet was asked for.
func (h *handle) Read(_ context.Context, dest []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.got {
		content, errno := h.attribute.read()
		if errno != 0 {
			return nil, errno
		}
		h.content, h.got = content, true
	}
	n := 0
	if at < int64(len(h.content)) {
		n = copy(dest, h.content[at:])
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Write takes a value, which must come in one piece.
func (h *handle) Write(_ context.Context, b []byte, at int64) (uint32, syscall.Errno) {
	if at != 0 {
		return 0, syscall.EINVAL
	}
	if errno := h.attribute.write(b); errno != 0 {
		return 0, errno
	}
	return uint32(len(b)), 0
}
