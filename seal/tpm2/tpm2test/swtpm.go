// Package tpm2test runs a software TPM for tests: the real swtpm, behind a Unix socket of its own.
package tpm2test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	gotpm "github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
	"golang.org/x/sys/unix"
)

// A TPM is a running swtpm. It ends with the test.
type TPM struct {
	// Path is that of its socket.
	Path string

	t     testing.TB
	state string
	cmd   *exec.Cmd
	log   bytes.Buffer
}

// Start starts a new TPM with no state. Without swtpm the test is skipped, or with CI=true fails.
func Start(t testing.TB) *TPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("swtpm is missing: apt-get install swtpm")
		}
		t.Skip("swtpm is missing: apt-get install swtpm")
	}
	// Not t.TempDir: the path of a socket has at most 107 octets.
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		t.Fatal(err)
	}
	s := &TPM{t: t, Path: filepath.Join(dir, "sock"), state: dir}
	t.Cleanup(func() {
		s.Stop()
		os.RemoveAll(dir)
	})
	s.run()
	return s
}

// run starts swtpm with a socket that listens already, so that nobody need wait for it.
func (s *TPM) run() {
	s.t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Path})
	if err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	s.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.state, "--server", "type=unixio,fd=3",
		"--flags", "not-need-init,startup-clear")
	s.cmd.ExtraFiles = []*os.File{f}
	s.cmd.Stderr = &s.log
	s.cmd.SysProcAttr = diesWithTest()
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("starting swtpm: %v", err)
	}
}

// Stop ends the TPM, as when its machine is switched off. Its state stays until the test ends.
func (s *TPM) Stop() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Signal(unix.SIGTERM)
	s.cmd.Wait()
	s.cmd = nil
	os.Remove(s.Path)
}

// Pause stops the TPM from answering, until Resume.
func (s *TPM) Pause() { s.cmd.Process.Signal(unix.SIGSTOP) }

// Resume lets it answer again.
func (s *TPM) Resume() { s.cmd.Process.Signal(unix.SIGCONT) }

// Reboot shuts the TPM down and starts it again: PCRs are as at power-on, its keys are the same.
func (s *TPM) Reboot() {
	s.t.Helper()
	s.Do(func(t transport.TPM) error {
		_, err := gotpm.Shutdown{ShutdownType: gotpm.TPMSUClear}.Execute(t)
		return err
	})
	s.Stop()
	s.run()
}

// Clear resets the TPM to new owner keys, as a firmware menu does.
func (s *TPM) Clear() {
	s.t.Helper()
	s.Do(func(t transport.TPM) error {
		_, err := gotpm.Clear{AuthHandle: gotpm.AuthHandle{Handle: gotpm.TPMRHPlatform, Auth: gotpm.PasswordAuth(nil)}}.Execute(t)
		return err
	})
}

// Extend extends one PCR of the sha256 bank.
func (s *TPM) Extend(pcr int) {
	s.t.Helper()
	s.Do(func(t transport.TPM) error {
		_, err := gotpm.PCRExtend{
			PCRHandle: gotpm.AuthHandle{Handle: gotpm.TPMHandle(pcr), Auth: gotpm.PasswordAuth(nil)},
			Digests: gotpm.TPMLDigestValues{Digests: []gotpm.TPMTHA{
				{HashAlg: gotpm.TPMAlgSHA256, Digest: bytes.Repeat([]byte{0xee}, 32)},
			}},
		}.Execute(t)
		return err
	})
}

// Do runs commands of the test's own.
func (s *TPM) Do(f func(transport.TPM) error) {
	s.t.Helper()
	t, err := linuxudstpm.Open(s.Path)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := f(t); err != nil {
		s.t.Fatalf("%v; swtpm says: %s", err, s.log.String())
	}
}

// Handles lists the loaded objects and sessions.
func (s *TPM) Handles() []gotpm.TPMHandle {
	s.t.Helper()
	var all []gotpm.TPMHandle
	s.Do(func(t transport.TPM) error {
		for _, first := range []uint32{0x80000000, 0x02000000} {
			r, err := gotpm.GetCapability{Capability: gotpm.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(t)
			if err != nil {
				return err
			}
			h, err := r.CapabilityData.Data.Handles()
			if err != nil {
				return err
			}
			all = append(all, h.Handle...)
		}
		return nil
	})
	return all
}
