package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// What follows reads bbolt's file format, version 2: bbolt's own check may run only on a file that is sound enough not to
// bring the process down. Numbers are in the machine's octet order; pages are counted from 0.
const (
	metaMagic   = 0xED0CDAED
	metaVersion = 2

	headerSize   = 16 // id 8, flags 2, count 2, overflow 4
	metaSize     = 64 // magic, version, page size, flags: 4 each; root, sequence, freelist, pages, transaction, checksum: 8 each
	bucketSize   = 16 // root page 8, sequence 8; root 0 is a page that follows inline
	elementSize  = 16
	branchFlag   = 0x01
	leafFlag     = 0x02
	freelistFlag = 0x10
	noFreelist   = ^uint64(0)
	maxDepth     = 32
)

// An image is the file as its newest meta page describes it.
type image struct {
	file     io.ReaderAt
	pageSize uint64
	root     uint64
	freelist uint64
	pages    uint64 // high-water mark: pages from here on are not in use
	seen     []bool // pages that something refers to
}

// check says what is wrong with the file's structure: every page that the newest state refers to lies inside the file, is
// what it must be, sorted, and referred to once, by its first key, and none of them is on the list of free pages. It reads each
// of them once.
func check(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%w: not a regular file", ErrCorrupt)
	}
	if err := checkImage(f, uint64(st.Size())); err != nil {
		return fmt.Errorf("%w: %w: restore it from a copy, or move it away to begin anew", ErrCorrupt, err)
	}
	return nil
}

func checkImage(r io.ReaderAt, size uint64) error {
	im, err := newestMeta(r, size)
	if err != nil {
		return err
	}
	if im.pages > size/im.pageSize {
		return fmt.Errorf("it is cut: %d octets, its %d pages need %d", size, im.pages, im.pages*im.pageSize)
	}
	im.seen = make([]bool, im.pages)
	im.seen[0], im.seen[1] = true, true
	if _, err := im.tree(im.root, 0); err != nil {
		return err
	}
	if im.freelist == noFreelist {
		return nil
	}
	return im.free()
}

// newestMeta reads both meta pages and takes the valid one with the higher transaction, as bbolt does. The other may be
// broken: that is how a write that was cut off looks.
func newestMeta(r io.ReaderAt, size uint64) (*image, error) {
	if size == 0 {
		return nil, errors.New("it is empty")
	}
	pageSize := uint64(os.Getpagesize())
	var newest *image
	var newestTx uint64
	for i := range uint64(2) {
		m := make([]byte, headerSize+metaSize)
		if _, err := r.ReadAt(m, int64(i*pageSize)); err != nil {
			continue
		}
		if im, tx := parseMeta(m[headerSize:], pageSize); im != nil && (newest == nil || tx > newestTx) {
			newest, newestTx = im, tx
		}
	}
	if newest == nil {
		return nil, errors.New("no valid meta page")
	}
	newest.file = r
	return newest, nil
}

func parseMeta(m []byte, pageSize uint64) (*image, uint64) {
	sum := fnv.New64a()
	sum.Write(m[:56])
	ok := u32(m) == metaMagic && u32(m[4:]) == metaVersion && uint64(u32(m[8:])) == pageSize && u64(m[56:]) == sum.Sum64()
	im := &image{pageSize: pageSize, root: u64(m[16:]), freelist: u64(m[32:]), pages: u64(m[40:])}
	if !ok || im.pages < 3 {
		return nil, 0
	}
	return im, u64(m[48:])
}

func u32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

// page reads page id with its overflow, marks it as seen and returns it whole.
func (im *image) page(id uint64) ([]byte, error) {
	if id < 2 || id >= im.pages {
		return nil, fmt.Errorf("page %d is referred to, there are %d", id, im.pages)
	}
	header := make([]byte, headerSize)
	if _, err := im.file.ReadAt(header, int64(id*im.pageSize)); err != nil {
		return nil, err
	}
	n := uint64(u32(header[12:])) + 1
	if u64(header) != id || n > im.pages-id {
		return nil, fmt.Errorf("page %d calls itself page %d of %d pages' length", id, u64(header), n)
	}
	for i := id; i < id+n; i++ {
		if im.seen[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		im.seen[i] = true
	}
	p := make([]byte, n*im.pageSize)
	if _, err := im.file.ReadAt(p, int64(id*im.pageSize)); err != nil {
		return nil, err
	}
	return p, nil
}

// tree checks a page and all below it, and returns its first key.
func (im *image) tree(id uint64, depth int) (first []byte, err error) {
	p, err := im.page(id)
	if err != nil {
		return nil, err
	}
	if first, err = im.node(p, depth); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return first, nil
}

// node checks a branch or leaf page and what it refers to, and returns its first key. bbolt finds a page by the key that its parent
// has for it, and keeps the two equal: where they are not, it panics when it writes.
func (im *image) node(p []byte, depth int) (first []byte, err error) {
	flags, count := binary.NativeEndian.Uint16(p[8:]), int(binary.NativeEndian.Uint16(p[10:]))
	switch {
	case depth > maxDepth:
		return nil, errors.New("too deep")
	case flags != branchFlag && flags != leafFlag:
		return nil, fmt.Errorf("unexpected kind %#x", flags)
	case flags == branchFlag && count == 0:
		return nil, errors.New("a branch without children")
	case headerSize+count*elementSize > len(p):
		return nil, fmt.Errorf("%d elements do not fit", count)
	}
	var last []byte
	for i := range count {
		at := headerSize + i*elementSize
		key, err := im.element(p[at:], flags == branchFlag, depth)
		if err != nil {
			return nil, fmt.Errorf("element %d: %w", i, err)
		}
		if i > 0 && bytes.Compare(last, key) >= 0 {
			return nil, fmt.Errorf("element %d is not after the one before it", i)
		}
		if i == 0 {
			first = key
		}
		last = key
	}
	return first, nil
}

// element checks one element, to which positions in it are relative, and returns its key.
func (im *image) element(e []byte, branch bool, depth int) ([]byte, error) {
	pos, size := uint64(u32(e)), uint64(u32(e[4:]))
	if branch {
		if pos+size > uint64(len(e)) {
			return nil, errors.New("its key is outside of the page")
		}
		first, err := im.tree(u64(e[8:]), depth+1)
		if err == nil && !bytes.Equal(first, e[pos:pos+size]) {
			err = errors.New("its key is not the first of the page that it refers to")
		}
		return e[pos : pos+size], err
	}
	flags, pos, size, valueSize := u32(e), uint64(u32(e[4:])), uint64(u32(e[8:])), uint64(u32(e[12:]))
	if pos+size+valueSize > uint64(len(e)) {
		return nil, errors.New("it is outside of the page")
	}
	key, value := e[pos:pos+size], e[pos+size:pos+size+valueSize]
	switch flags {
	case 0:
		return key, nil
	case 1:
		return key, im.bucket(value, depth)
	}
	return nil, fmt.Errorf("unexpected kind %#x", flags)
}

func (im *image) bucket(v []byte, depth int) error {
	if len(v) < bucketSize {
		return errors.New("a bucket's header is cut")
	}
	if root := u64(v); root != 0 {
		_, err := im.tree(root, depth+1)
		return err
	}
	inline := v[bucketSize:]
	if len(inline) < headerSize {
		return errors.New("an inline bucket is cut")
	}
	if binary.NativeEndian.Uint16(inline[8:]) != leafFlag {
		return errors.New("an inline bucket that is no leaf")
	}
	_, err := im.node(inline, depth+1)
	return err
}

// free checks the list of free pages against the pages in use. It runs last, and marks what it reads like tree does.
func (im *image) free() error {
	p, err := im.page(im.freelist)
	if err != nil {
		return fmt.Errorf("the list of free pages: %w", err)
	}
	if flags := binary.NativeEndian.Uint16(p[8:]); flags != freelistFlag {
		return fmt.Errorf("the list of free pages has kind %#x", flags)
	}
	count, ids := uint64(binary.NativeEndian.Uint16(p[10:])), p[headerSize:]
	if count == 0xFFFF { // then the first of them is the number of the others
		count, ids = u64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("the list of free pages is cut: %d pages", count)
	}
	for i := range count {
		id := u64(ids[8*i:])
		if id < 2 || id >= im.pages || im.seen[id] {
			return fmt.Errorf("page %d is in use and in the list of free pages", id)
		}
		im.seen[id] = true
	}
	return nil
}
