package main

import (
	"bytes"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/term"

	"keybroker/seal/passphrase"
)

// credentialName is the systemd credential that opens a passphrase slot, below $CREDENTIALS_DIRECTORY.
const credentialName = "keybroker.passphrase"

// A passphraseSource is where a command gets a passphrase from: never an argument, never the environment.
type passphraseSource struct {
	// human: somebody types it.
	human bool
	// get returns octets of the caller's own, the same each time.
	get func(context.Context) ([]byte, error)
}

// passphraseFrom returns the source that --passphrase-file names ("-" is standard input); without it the systemd credential, if
// there is one; without that a prompt, which for a new passphrase asks twice.
func (g *globals) passphraseFrom(file, prompt string, isNew bool) passphraseSource {
	if file == "" {
		if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
			credential := filepath.Join(dir, credentialName)
			if _, err := os.Stat(credential); err == nil {
				file = credential
			}
		}
	}
	switch {
	case file == "-":
		return passphraseSource{get: once(func(context.Context) ([]byte, error) { return readPassphrase(g.stdin) })}
	case file != "":
		return passphraseSource{get: once(func(context.Context) ([]byte, error) { return g.readPassphraseFile(file) })}
	}
	return passphraseSource{human: true, get: once(func(ctx context.Context) ([]byte, error) { return askTerminal(ctx, prompt, isNew) })}
}

// once remembers what get returned, so that a realm with two passphrase slots asks for one passphrase.
func once(get func(context.Context) ([]byte, error)) func(context.Context) ([]byte, error) {
	var first sync.Once
	var octets []byte
	var err error
	return func(ctx context.Context) ([]byte, error) {
		first.Do(func() { octets, err = get(ctx) })
		return bytes.Clone(octets), err
	}
}

func (g *globals) readPassphraseFile(path string) ([]byte, error) {
	f, err := g.openSecret(path)
	if err != nil {
		return nil, fmt.Errorf("reading the passphrase: %w", err)
	}
	defer f.Close()
	return readPassphrase(f)
}

// openSecret opens a file that holds a secret, and warns if the secret is everybody's.
func (g *globals) openSecret(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	const others = 0o006
	if mode := st.Mode(); mode.IsRegular() && mode.Perm()&others != 0 {
		g.warn("%s has mode %04o, which lets every user of this machine in: `chmod o-rw %s` mends that", path, mode.Perm(), path)
	}
	return f, nil
}

// readPassphrase reads a bounded passphrase and strips one newline at its end.
func readPassphrase(r io.Reader) ([]byte, error) {
	octets, err := io.ReadAll(io.LimitReader(r, passphrase.MaxLength+2))
	if err != nil {
		clear(octets)
		return nil, fmt.Errorf("reading the passphrase: %w", err)
	}
	octets = bytes.TrimSuffix(octets, []byte("\n"))
	switch {
	case len(octets) == 0:
		return nil, passphrase.ErrNone
	case len(octets) > passphrase.MaxLength:
		clear(octets)
		return nil, passphrase.ErrTooLong
	}
	return octets, nil
}

// askTerminal asks at the terminal that controls this process, else at standard input if that is one.
func askTerminal(ctx context.Context, prompt string, isNew bool) ([]byte, error) {
	in, out := os.Stdin, os.Stderr
	if tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		defer tty.Close()
		in, out = tty, tty
	} else if !term.IsTerminal(int(in.Fd())) {
		return nil, hintedError{
			errors.New("a passphrase is needed, and there is no terminal to ask at"),
			"give it by --passphrase-file FILE (`-` is standard input), or as the systemd credential " + credentialName,
		}
	}
	octets, err := readTerminal(ctx, in, out, prompt+": ")
	if err != nil || !isNew {
		return octets, err
	}
	if err := passphrase.CheckNew(octets); err != nil {
		clear(octets)
		return nil, err
	}
	again, err := readTerminal(ctx, in, out, prompt+", again: ")
	defer clear(again)
	if err == nil && subtle.ConstantTimeCompare(octets, again) != 1 {
		err = errors.New("the two passphrases differ")
	}
	if err != nil {
		clear(octets)
		return nil, err
	}
	return octets, nil
}

// readTerminal reads a line without echo. An interrupt gives the terminal its echo back.
func readTerminal(ctx context.Context, in, out *os.File, prompt string) ([]byte, error) {
	fd := int(in.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("asking for the passphrase: %w", err)
	}
	fmt.Fprint(out, prompt)
	type result struct {
		octets []byte
		err    error
	}
	done := make(chan result, 1)
	go func() {
		octets, err := term.ReadPassword(fd)
		done <- result{octets, err}
	}()
	select {
	case <-ctx.Done():
		term.Restore(fd, before)
		fmt.Fprintln(out)
		return nil, context.Cause(ctx)
	case r := <-done:
		fmt.Fprintln(out)
		if errors.Is(r.err, io.EOF) || r.err == nil && len(r.octets) == 0 {
			return nil, passphrase.ErrNone
		}
		return r.octets, r.err
	}
}

// missing reports whether a path is not there at all.
func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}
