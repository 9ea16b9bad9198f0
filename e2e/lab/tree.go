package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

//go:embed tree.sh
var treeScript []byte

// treeDir is the cached folder that this recipe makes: another recipe has another name.
func treeDir(cache string) string {
	sum := sha256.Sum256(treeScript)
	return filepath.Join(cache, "lab-"+hex.EncodeToString(sum[:6]))
}

// isComplete says whether a cached folder was made whole.
func isComplete(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "complete"))
	return err == nil
}

// makeTree makes the cached folder under another name and renames it when it is whole. Of two at once one makes it and the
// other waits. When ctx is done nothing of it is left.
func makeTree(ctx context.Context, cache, log string) error {
	dir := treeDir(cache)
	unlock, err := lock(ctx, dir+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if isComplete(dir) {
		return nil
	}
	making := dir + ".making"
	// what a killed one left; its mounts went with it
	if err := os.RemoveAll(making); err != nil {
		return err
	}
	if err := os.Mkdir(making, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(making)
	if err := runTreeScript(ctx, making, log); err != nil {
		return err
	}
	return os.Rename(making, dir)
}

func runTreeScript(ctx context.Context, dir, log string) error {
	cmd := exec.CommandContext(ctx, "/bin/bash", "-c", string(treeScript), "tree.sh", dir, log)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Process 1 of a PID namespace takes all of it along, and the mounts, when it ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL, Setpgid: true,
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() == nil {
			printTail(os.Stderr, log, 20)
		}
		return fmt.Errorf("making the host's tree: %w", err)
	}
	return nil
}

// lock takes a lock that ends with the process.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	taken := make(chan error, 1)
	go func() { taken <- flock(f) }()
	select {
	case err = <-taken:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("waiting for another lab that makes the tree: %w", err)
	}
	return func() { f.Close() }, nil
}

func flock(f *os.File) error {
	for {
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
