package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"keybroker/internal/tomlfile"
	"keybroker/internal/tuple"
)

// maxDropIns is how many drop-ins are read.
const maxDropIns = 256

// A Source says where a policy is.
type Source struct {
	File     string // policy.toml
	Dir      string // its drop-ins, read after it in the order of their names; empty: none
	Required bool   // File must exist; false: a missing File is an empty one, which allows nothing
}

// A File is the text of one policy file.
type File struct {
	Name string // as in messages and in the digest: "policy.toml", "policy.d/10-web.toml"
	Text []byte
}

// Load reads the policy. Each file has at most 1 MiB and is writable by root and this process's user alone. Errors name
// file and line, and are joined if there are several.
func Load(src Source) (*Policy, error) {
	var files []File
	text, err := tomlfile.Read(src.File)
	switch {
	case err == nil:
		files = append(files, File{Name: filepath.Base(src.File), Text: text})
	case src.Required || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("reading policy: %w", err)
	}
	dropIns, err := readDropIns(src.Dir)
	if err != nil {
		return nil, fmt.Errorf("reading policy: %w", err)
	}
	return Parse(append(files, dropIns...)...)
}

func readDropIns(dir string) ([]File, error) {
	if dir == "" {
		return nil, nil
	}
	paths, err := tomlfile.List(dir, maxDropIns)
	if err != nil {
		return nil, err
	}
	var files []File
	for _, path := range paths {
		text, err := tomlfile.Read(path)
		if err != nil {
			return nil, err
		}
		name := filepath.Join(filepath.Base(dir), filepath.Base(path))
		files = append(files, File{Name: name, Text: text})
	}
	return files, nil
}

// Parse makes a policy of files in their order. Without any it is the policy that allows nothing.
func Parse(files ...File) (*Policy, error) {
	b := newBuilder()
	var errs []error
	digested := [][]byte{[]byte("keybroker/v1 policy")}
	for _, f := range files {
		digested = append(digested, []byte(f.Name), f.Text)
		errs = append(errs, b.file(f))
	}
	if err := errors.Join(errs...); err != nil { // some file is missing, so that nothing is known of names across files
		return nil, errors.Join(err, b.err())
	}
	if err := b.finish(); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(tuple.Encode(digested...))
	b.p.digest = hex.EncodeToString(digest[:])
	return b.p, nil
}

// file adds the entries of one file. What is wrong in them is collected by its table; an error means that it is no TOML.
func (b *builder) file(f File) error {
	t, err := tomlfile.Parse(f.Name, f.Text)
	if err != nil {
		return err
	}
	b.roots = append(b.roots, t)
	for _, entry := range t.Tables("service") {
		b.service(f.Name, entry)
	}
	for _, entry := range t.Tables("vm") {
		b.vm(f.Name, entry)
	}
	for _, entry := range t.Tables("snp") {
		b.snp(f.Name, entry)
	}
	return nil
}
