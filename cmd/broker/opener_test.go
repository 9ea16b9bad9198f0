package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/derive"
	"keybroker/internal/daemon"
	"keybroker/internal/need"
	"keybroker/seal"
	"keybroker/seal/tpm2/tpm2test"
)

const (
	rightPhrase = "correct horse battery"
	wrongPhrase = "correct horse buttery"
)

// keybroker makes a command of this program, which the test binary is under that name.
func keybroker(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Args = append([]string{"keybroker"}, args...)
	return cmd
}

// initRealm makes a realm and returns its folder.
func initRealm(t testing.TB, args ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "s")
	cmd := keybroker(t, append([]string{"--state-dir", dir, "init"}, args...)...)
	cmd.Stdin = strings.NewReader(rightPhrase)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("init: %v: %s", err, out)
	}
	return dir
}

func initPassphrase(t testing.TB) string {
	return initRealm(t, "--slot", "passphrase", "--passphrase-file", "-")
}

// A startedOpener is an opener and what its broker holds of it.
type startedOpener struct {
	t      testing.TB
	cmd    *exec.Cmd
	page   *os.File
	lines  *bufio.Scanner
	socket string
	stderr bytes.Buffer
}

// startOpener starts `keybroker keyholder-open` as the broker does, with a listener at socket unless that is empty.
func startOpener(t testing.TB, dir, socket string, args ...string) *startedOpener {
	t.Helper()
	page, err := derive.NewPage()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { page.Close() })
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { statusRead.Close() })
	o := &startedOpener{t: t, page: page, lines: bufio.NewScanner(statusRead), socket: socket}
	o.cmd = keybroker(t, append([]string{"keyholder-open", "--realm", filepath.Join(dir, "realm.json")}, args...)...)
	o.cmd.ExtraFiles = []*os.File{page, statusWrite}
	o.cmd.Stderr = &o.stderr
	if socket != "" {
		o.cmd.ExtraFiles = append(o.cmd.ExtraFiles, listen(t, socket))
	}
	err = o.cmd.Start()
	statusWrite.Close()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// listen returns a listening Unix socket that the opener inherits, and that the broker keeps.
func listen(t testing.TB, socket string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); l.Close() })
	return f
}

func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "unlock.sock")
}

// next reads one line of the opener's report.
func (o *startedOpener) next(state string) daemon.OpenerReport {
	o.t.Helper()
	var r daemon.OpenerReport
	if !o.lines.Scan() {
		o.t.Fatalf("the report ended, want state %s; stderr: %s", state, o.stderr.String())
	}
	if err := json.Unmarshal(o.lines.Bytes(), &r, json.RejectUnknownMembers(true)); err != nil {
		o.t.Fatal(err)
	}
	if r.State != state {
		o.t.Fatalf("state %s, want %s: %s", r.State, state, r.Why)
	}
	return r
}

// end waits for the opener's end with an exit status, and checks that the page is filled after success and empty after failure.
func (o *startedOpener) end(status int) {
	o.t.Helper()
	if o.lines.Scan() {
		o.t.Errorf("one more line: %s", o.lines.Text())
	}
	o.cmd.Wait()
	if got := o.cmd.ProcessState.ExitCode(); got != status {
		o.t.Errorf("exit status %d, want %d: %s", got, status, o.stderr.String())
	}
	m, err := derive.NewMaster(bytes.Repeat([]byte{1, 2}, 16))
	if err != nil {
		o.t.Fatal(err)
	}
	if filled := errors.Is(derive.FillPage(o.page, []derive.Master{m}), derive.ErrPageFilled); filled != (status == 0) {
		o.t.Errorf("after exit status %d the page is filled: %v", status, filled)
	}
}

func (o *startedOpener) bring(phrase string) error {
	return bringPassphrase(o.t.Context(), o.socket, []byte(phrase))
}

func passphraseFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pass")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenerByFile(t *testing.T) {
	dir := initPassphrase(t)
	file, err := seal.Load(filepath.Join(dir, "realm.json"))
	if err != nil {
		t.Fatal(err)
	}
	o := startOpener(t, dir, "", "--passphrase-file", passphraseFile(t, rightPhrase+"\n"), "--pin", file.RealmID().String())
	if r := o.next(daemon.OpenerOpened); r.Kind != "passphrase" || r.Slot != file.Slots()[0].ID.String() {
		t.Errorf("opened by %s (%s)", r.Slot, r.Kind)
	}
	o.end(0)

	o = startOpener(t, dir, "", "--passphrase-file", passphraseFile(t, wrongPhrase))
	if r := o.next(daemon.OpenerFailed); !strings.Contains(r.Why, "passphrase") {
		t.Error(r.Why)
	}
	o.end(1)

	o = startOpener(t, dir, "", "--passphrase-file", passphraseFile(t, rightPhrase), "--order", "tpm2")
	if r := o.next(daemon.OpenerFailed); !strings.Contains(r.Why, "no slot") {
		t.Errorf("a kind that is not in the order: %s", r.Why)
	}
	o.end(1)
}

func TestOpenerByCredential(t *testing.T) {
	dir := initPassphrase(t)
	credentials := t.TempDir()
	if err := os.WriteFile(filepath.Join(credentials, credentialName), []byte(rightPhrase), 0o400); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	o := startOpener(t, dir, "")
	o.next(daemon.OpenerOpened)
	o.end(0)
}

func TestOpenerByTPM(t *testing.T) {
	tpm := tpm2test.Start(t)
	dir := initRealm(t, "--slot", "tpm2", "--slot", "passphrase", "--passphrase-file", "-", "--tpm", tpm.Path)
	socket := socketPath(t)
	o := startOpener(t, dir, socket, "--tpm", tpm.Path)
	if r := o.next(daemon.OpenerOpened); r.Kind != "tpm2" {
		t.Errorf("opened by %s", r.Kind)
	}
	o.end(0)
	tpm.Extend(7)

	o = startOpener(t, dir, "", "--tpm", tpm.Path, "--order", "tpm2")
	if r := o.next(daemon.OpenerFailed); !strings.Contains(r.Why, "PCR 7 (sha256) changed from ") {
		t.Error(r.Why)
	}
	o.end(1)

	o = startOpener(t, dir, socketPath(t), "--tpm", tpm.Path)
	if r := o.next(daemon.OpenerWaiting); !strings.Contains(r.Why, "PCR 7 (sha256) changed from ") || !strings.Contains(r.Why, "`keybroker unlock`") {
		t.Errorf("waits because %s", r.Why)
	}
	if err := o.bring(rightPhrase); err != nil {
		t.Error(err)
	}
	if r := o.next(daemon.OpenerOpened); r.Kind != "passphrase" {
		t.Errorf("opened by %s", r.Kind)
	}
	o.end(0)
}

func TestOpenerDamage(t *testing.T) {
	dir := initPassphrase(t)
	path := filepath.Join(dir, "realm.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for want, octets := range map[string][]byte{
		"is truncated":             good[:len(good)/2],
		"is damaged or was edited": bytes.Replace(good, []byte(`"require": 1`), []byte(`"require": 7`), 1),
		"needs a newer keybroker":  bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1),
		"another realm":            good,
		"no such file":             nil,
	} {
		os.Remove(path)
		if octets != nil {
			if err := os.WriteFile(path, octets, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// With a listener too: no passphrase mends these.
		o := startOpener(t, dir, socketPath(t), "--pin", strings.Repeat("0", 32))
		if r := o.next(daemon.OpenerFailed); !strings.Contains(r.Why, want) || strings.Contains(r.Why, "\n") {
			t.Errorf("%s; expected %q", r.Why, want)
		}
		o.end(1)
	}
}

// By hand, without the broker's descriptors, the opener does nothing.
func TestOpenerByHand(t *testing.T) {
	for _, args := range [][]string{nil, {"--realm", "x"}, {"--realm", "x", "--order", "yubikey"}, {"--realm", "x", "--pin", "0"}} {
		cmd := keybroker(t, append([]string{"keyholder-open"}, args...)...)
		out, _ := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != exitUsage || !bytes.HasPrefix(out, []byte("keybroker: error: ")) {
			t.Errorf("%v: %v: %s", args, cmd.ProcessState, out)
		}
	}
}

// An opener that waits ends when the broker ends it.
func TestOpenerTerminates(t *testing.T) {
	o := startOpener(t, initPassphrase(t), socketPath(t))
	o.next(daemon.OpenerWaiting)
	o.cmd.Process.Signal(syscall.SIGTERM)
	o.next(daemon.OpenerFailed)
	o.end(1)
}

func TestUnlock(t *testing.T) {
	o := startOpener(t, initPassphrase(t), socketPath(t))
	if r := o.next(daemon.OpenerWaiting); !strings.Contains(r.Why, "`keybroker unlock`") {
		t.Errorf("waits because %s", r.Why)
	}
	// Clients that send nothing, or too much, or leave, block nobody.
	for _, octets := range [][]byte{nil, nil, bytes.Repeat([]byte("x"), 1100), []byte("half")} {
		c, err := net.Dial("unix", o.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write(octets)
	}
	if err := o.bring(""); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("an empty passphrase: %v", err)
	}
	start := time.Now()
	for range 2 {
		if err := o.bring(wrongPhrase); err == nil || !strings.Contains(err.Error(), "wrong passphrase") || strings.Contains(err.Error(), "buttery") {
			t.Errorf("a wrong passphrase: %v", err)
		}
	}
	if since := time.Since(start); since < unlockPause {
		t.Errorf("two attempts within %v", since)
	}
	if err := o.bring(rightPhrase); err != nil {
		t.Error(err)
	}
	o.next(daemon.OpenerOpened)
	o.end(0)
	// The broker still listens, and nothing accepts.
	if err := o.bring(rightPhrase); !errors.Is(err, errNothingWaits) {
		t.Errorf("after the opener's end: %v", err)
	}
}

// Where nothing accepts, no octet of the passphrase stays behind in the socket.
func TestUnlockNothingWaits(t *testing.T) {
	socket := socketPath(t)
	if err := bringPassphrase(t.Context(), socket, []byte(rightPhrase)); !errors.Is(err, errNothingWaits) {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := bringPassphrase(t.Context(), socket, []byte(rightPhrase)); !errors.Is(err, errNothingWaits) {
		t.Errorf("no opener: %v", err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if left, err := io.ReadAll(c); err != nil || len(left) != 0 {
		t.Errorf("%d octets stayed in the socket, %v", len(left), err)
	}
}

// The client gives up when it is interrupted.
func TestUnlockInterrupted(t *testing.T) {
	socket := socketPath(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- bringPassphrase(ctx, socket, []byte(rightPhrase)) }()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, `{"waiting":true}`+"\n")
	if got, err := io.ReadAll(c); err != nil || string(got) != rightPhrase {
		t.Errorf("got %d octets, %v", len(got), err)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("interrupted, and no error")
	}
}

// Another user may not bring a passphrase, even where the socket's mode lets it in.
func TestUnlockOtherUser(t *testing.T) {
	need.Root(t)
	o := startOpener(t, initPassphrase(t), socketPath(t))
	o.next(daemon.OpenerWaiting)
	if err := errors.Join(os.Chmod(filepath.Dir(o.socket), 0o755), os.Chmod(o.socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), copySelf(t, filepath.Dir(o.socket)), o.socket)
	cmd.Args[0] = "bring-passphrase"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("only root may unlock")) {
		t.Errorf("%v: %s", err, out)
	}
	if err := o.bring(rightPhrase); err != nil {
		t.Error(err)
	}
	o.next(daemon.OpenerOpened)
	o.end(0)
}

// copySelf copies the test binary to where every user may run it.
func copySelf(t testing.TB, dir string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	octets, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "self")
	if err := os.WriteFile(path, octets, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// Nobody of the same user reads the opener's memory, and it leaves no core.
func TestOpenerHardened(t *testing.T) {
	o := startOpener(t, initPassphrase(t), socketPath(t))
	o.next(daemon.OpenerWaiting)
	proc := filepath.Join("/proc", strconv.Itoa(o.cmd.Process.Pid))
	threads, err := filepath.Glob(filepath.Join(proc, "task", "*", "status"))
	if err != nil {
		t.Fatal(err)
	}
	bounded := 0 // a build with cgo, as for the race detector, bounds one thread alone
	for _, thread := range threads {
		if status, err := os.ReadFile(thread); err == nil && bytes.Contains(status, []byte("NoNewPrivs:\t1")) {
			bounded++
		}
	}
	if bounded == 0 {
		t.Error("new privileges are possible")
	}
	limits, err := os.ReadFile(filepath.Join(proc, "limits"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if strings.HasPrefix(line, "Max core file size") && strings.Join(strings.Fields(line)[4:6], " ") != "0 0" {
			t.Errorf("core dumps: %s", line)
		}
	}
	o.cmd.Process.Signal(syscall.SIGTERM)
	o.next(daemon.OpenerFailed)
	o.end(1)
}
