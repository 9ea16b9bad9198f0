package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/term"
)

// detach is Ctrl-], as in telnet and virsh: in a shell, where Ctrl-C belongs to the host VM, it ends the run.
const detach = 0x1d

// otherHalf runs the half that needs root and returns its exit status. What stdin gives goes to its standard input, which
// stays open until ctx is done.
func (j *job) otherHalf(ctx context.Context, stdin io.Reader, args ...string) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	argv := append([]string{self, "as-root"}, args...)
	if os.Geteuid() != 0 {
		argv = append([]string{"sudo"}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	alive, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("starting the half that needs root: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { alive.Close() })
	defer stop()
	if stdin != nil {
		go func() {
			copyUntilDetach(alive, stdin)
			alive.Close()
		}()
	}
	return exitStatus(cmd.Wait())
}

// copyUntilDetach copies until the reader ends, the writer does, or Ctrl-] comes.
func copyUntilDetach(w io.Writer, r io.Reader) {
	buffer := make([]byte, 256)
	for {
		n, err := r.Read(buffer)
		for i, c := range buffer[:n] {
			if c == detach {
				n, err = i, io.EOF
				break
			}
		}
		if _, werr := w.Write(buffer[:n]); werr != nil || err != nil {
			return
		}
	}
}

func exitStatus(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// runVM has the other half run the host VM, with the terminal as its console for a shell.
func (j *job) runVM(ctx context.Context, tree string) (int, error) {
	args := []string{"vm", tree, j.dir, j.mode, j.limit, strconv.Itoa(j.phases), fmt.Sprintf("%d:%d", os.Getuid(), os.Getgid())}
	if j.mode != "shell" {
		return j.otherHalf(ctx, nil, args...)
	}
	terminal := int(os.Stdin.Fd())
	if !term.IsTerminal(terminal) {
		return 0, errors.New("a shell needs a terminal; make lab RUN='COMMAND' does not")
	}
	fmt.Fprintln(j.progress, "                 a root shell in the host VM; exit or Ctrl-] ends it")
	before, err := term.MakeRaw(terminal)
	if err != nil {
		return 0, fmt.Errorf("setting the terminal: %w", err)
	}
	defer term.Restore(terminal, before)
	return j.otherHalf(ctx, os.Stdin, args...)
}

// asRoot is the half that needs root.
func asRoot(args []string) int {
	// The terminal sends Ctrl-C to both halves; the first one's end is what counts.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	keyboard, keyboardIn := io.Pipe()
	go func() {
		io.Copy(keyboardIn, os.Stdin)
		cancel()
	}()
	var stderr io.Writer = os.Stderr
	status, err := exitFailed, error(nil)
	switch {
	case len(args) == 3 && args[0] == "tree":
		err = makeTree(ctx, args[1], filepath.Join(args[2], "tree.log"))
		if err == nil {
			status = 0
		}
	case len(args) == 7 && args[0] == "vm":
		var vm *hostVM
		if vm, err = newHostVM(args[1:], keyboard); err == nil {
			stderr = vm.stderr
			status, err = vm.run(ctx)
		}
	default:
		err = errors.New("this half is started by the other one")
	}
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(stderr, "lab: error: %v\n", err)
	}
	return status
}
