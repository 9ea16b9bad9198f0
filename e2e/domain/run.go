package domain

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Result is what a command in a guest left.
type Result struct {
	// Output is standard output and error together.
	Output string
	// Status is the exit status.
	Status int
}

// Run runs a shell command in the guest as one of its users, "root" or "user" (uid 1000), and waits for its end. Commands
// of one guest run one after the other; one that stays in the background has to close its output, as in `serve &>/dev/null &`.
func (s Spec) Run(ctx context.Context, user, command string) (Result, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return Result{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	token := rand.Text()
	line := fmt.Sprintf("%s %s %s\n", token, user, base64.StdEncoding.EncodeToString([]byte(command)))
	if _, err := io.WriteString(conn, line); err != nil {
		return Result{}, fmt.Errorf("sending a command to %s: %w", s.Name, err)
	}
	result, err := readResult(bufio.NewReader(conn), token)
	if err != nil {
		return result, fmt.Errorf("running %q in %s: %w", command, s.Name, errors.Join(err, ctx.Err()))
	}
	return result, nil
}

// dial connects to the guest's second console. QEMU lets in one after the other, so whoever waits is let in later.
func (s Spec) dial(ctx context.Context) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", filepath.Join(s.Dir(), "commands"))
	if err != nil {
		return nil, fmt.Errorf("connecting to the commands' console of %s: %w", s.Name, err)
	}
	return conn, nil
}

// readResult reads what guest-init answers. Before "begin" may stand what is left of a command that nobody waited for.
func readResult(r *bufio.Reader, token string) (Result, error) {
	begin, end := []byte("begin "+token+"\n"), "end "+token+" "
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return Result{}, err
		}
		if bytes.HasSuffix(line, begin) {
			break
		}
	}
	var out strings.Builder
	for {
		line, err := r.ReadString('\n')
		if status, found := strings.CutPrefix(line, end); found && err == nil {
			n, err := strconv.Atoi(strings.TrimSpace(status))
			// the line's end before "end" is guest-init's own
			return Result{Output: strings.TrimSuffix(out.String(), "\n"), Status: n}, err
		}
		out.WriteString(line)
		if err != nil {
			return Result{Output: out.String()}, err
		}
	}
}

// poll is how often a console is looked at.
const poll = 20 * time.Millisecond

// Wait waits until a line with the given text stands in the guest's console after the offset from, and returns that line
// and the offset after it. From 0 on is the whole console, all boots of it.
func (s Spec) Wait(ctx context.Context, from int64, text string) (line string, next int64, err error) {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		line, next, err = s.find(from, text)
		if err != nil || line != "" {
			return line, next, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", from, fmt.Errorf("waiting for %q on the console of %s: %w", text, s.Name, ctx.Err())
		}
	}
}

// find looks for a whole line with the text.
func (s Spec) find(from int64, text string) (string, int64, error) {
	f, err := os.Open(s.Console())
	if errors.Is(err, os.ErrNotExist) {
		return "", from, nil
	}
	if err != nil {
		return "", from, err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return "", from, err
	}
	lines, next := bufio.NewReader(f), from
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			return "", from, nil
		}
		if err != nil {
			return "", from, err
		}
		next += int64(len(line))
		if strings.Contains(line, text) {
			return strings.TrimRight(line, "\r\n"), next, nil
		}
	}
}

// ConsoleEnd is the offset of the console's present end, from which Wait finds only what comes later.
func (s Spec) ConsoleEnd() int64 {
	info, err := os.Stat(s.Console())
	if err != nil {
		return 0
	}
	return info.Size()
}

// up is what guest-init says when it can run commands.
const up = "guest: up "

// WaitUp waits until the guest has booted, after the offset from.
func (s Spec) WaitUp(ctx context.Context, from int64) error {
	_, _, err := s.Wait(ctx, from, up)
	return err
}

// Start starts the guest and waits until it has booted.
func (s Spec) Start(ctx context.Context) error {
	from := s.ConsoleEnd()
	if _, err := Virsh(ctx, "start", s.Name); err != nil {
		return err
	}
	return s.WaitUp(ctx, from)
}
