//go:build linux

package sink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// programTime is the most that one run of cryptsetup may take: a keyslot of an operator's with a slow KDF takes seconds.
const programTime = 2 * time.Minute

// programDirs are where cryptsetup is looked for. PATH is not asked.
var programDirs = []string{"/sbin", "/usr/sbin"}

// Cryptsetup's exit statuses, cryptsetup(8).
const (
	exitNoKey = 2
	exitBusy  = 5
)

// program is one run of cryptsetup. Keys go through pipes, the header through a file in memory: nothing of either is in argv,
// the environment or any file system.
type program struct {
	path   string
	header *os.File // /proc/self/fd/3 in argv
	key    []byte   // standard input
	key2   []byte   // /proc/self/fd/4, where there is one
}

const (
	headerPath = "/proc/self/fd/3"
	key2Path   = "/proc/self/fd/4"
)

// findProgram looks for cryptsetup where root's programs are.
func findProgram() (string, error) {
	for _, dir := range programDirs {
		path := dir + "/cryptsetup"
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("no cryptsetup in %s: install cryptsetup-bin (in the initramfs: cryptsetup-initramfs)", strings.Join(programDirs, " or "))
}

// run runs cryptsetup and gives its complaint in the error. Exit status 2 is ErrWrongKey.
func (p *program) run(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, programTime)
	defer cancel()
	c := exec.CommandContext(ctx, p.path, args...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	if unix.Access("/run/udev/control", unix.F_OK) != nil {
		c.Env = append(c.Env, "DM_DISABLE_UDEV=1") // no udevd to wait for: libdevmapper makes the node itself
	}
	c.WaitDelay = time.Second
	var complaint limitedBuffer
	c.Stderr = &complaint
	closeKeys, err := p.pass(c)
	if err != nil {
		return err
	}
	err = c.Start()
	closeKeys()
	if err != nil {
		return fmt.Errorf("running cryptsetup: %w", err)
	}
	return programError(ctx, args[0], c.Wait(), complaint.String())
}

// pass gives the child the header and the keys. The keys are in their pipes before it starts: a pipe holds far more.
func (p *program) pass(c *exec.Cmd) (func(), error) {
	stdin, err := filledPipe(p.key)
	if err != nil {
		return nil, err
	}
	c.Stdin = stdin
	opened := []*os.File{stdin}
	closeKeys := func() {
		for _, f := range opened {
			f.Close()
		}
	}
	header := p.header
	if header == nil {
		header = stdin // only its number is taken
	}
	c.ExtraFiles = []*os.File{header}
	if p.key2 != nil {
		second, err := filledPipe(p.key2)
		if err != nil {
			closeKeys()
			return nil, err
		}
		opened = append(opened, second)
		c.ExtraFiles = append(c.ExtraFiles, second)
	}
	return closeKeys, nil
}

// filledPipe gives the reading end of a pipe that holds octets and ends after them.
func filledPipe(octets []byte) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	defer w.Close()
	if _, err := w.Write(octets); err != nil {
		r.Close()
		return nil, fmt.Errorf("filling a pipe: %w", err)
	}
	return r, nil
}

func programError(ctx context.Context, action string, err error, complaint string) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("cryptsetup %s did not end in time: %w", action, ctx.Err())
	}
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) {
		return fmt.Errorf("running cryptsetup %s: %w", action, err)
	}
	switch exit.ExitCode() {
	case exitNoKey:
		return ErrWrongKey
	case exitBusy:
		return fmt.Errorf("cryptsetup %s: the device or the name is in use: %s", action, complaint)
	}
	if complaint == "" {
		complaint = exit.String()
	}
	return fmt.Errorf("cryptsetup %s: %s", action, complaint)
}

// limitedBuffer keeps the first few lines of what a program complains about, as one printable line.
type limitedBuffer struct{ b bytes.Buffer }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	const most = 1024
	l.b.Write(p[:min(len(p), most-min(l.b.Len(), most))])
	return len(p), nil
}

func (l *limitedBuffer) String() string {
	line := strings.Join(strings.Fields(l.b.String()), " ")
	return strings.Trim(strconv.QuoteToASCII(line), `"`)
}

// testKey says whether a key opens a keyslot, any for "". It needs no device mapper.
func testKey(ctx context.Context, path string, head *snapshot, device, slot string, key []byte) error {
	p := program{path: path, header: head.memory, key: key}
	return p.run(ctx, keyArgs([]string{"open", "--test-passphrase"}, slot, len(key), device)...)
}

func keyArgs(args []string, slot string, size int, rest ...string) []string {
	args = append(args, "--batch-mode", "--type", "luks2", "--header", headerPath, "--key-file", "-", "--keyfile-size", strconv.Itoa(size))
	if slot != "" {
		args = append(args, "--key-slot", slot)
	}
	return append(append(args, "--"), rest...)
}
