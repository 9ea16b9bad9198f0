package hypervisor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
)

// qemu starts a process whose arguments are a QEMU's.
func qemu(t *testing.T, args ...string) (*exec.Cmd, *Process) {
	t.Helper()
	cmd := exec.Command("/bin/sh", append([]string{"-c", "echo ready; read x", "qemu"}, args...)...)
	stdin, err := cmd.StdinPipe() // it lives until this is closed
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if _, err := stdout.Read(make([]byte, 6)); err != nil { // until then its arguments are not in place
		t.Fatal(err)
	}
	p, err := OpenProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return cmd, p
}

func TestProcess(t *testing.T) {
	cmd, p := qemu(t, "-uuid", testUUID)
	if !p.Alive() {
		t.Fatal("a process that runs is not alive")
	}
	if p.PID != cmd.Process.Pid || p.StartTime == 0 {
		t.Fatalf("process %d, start time %d", p.PID, p.StartTime)
	}
	if b := p.Boot(testUUID); !b.SameProcess(Boot{testUUID, p.PID, p.StartTime, 3}) {
		t.Errorf("boot %v", b)
	}
	select {
	case <-p.Done():
		t.Fatal("done while it runs")
	default:
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if p.Alive() { // not waited for yet: a zombie has ended too
		t.Error("alive after its end")
	}
	if _, err := OpenProcess(p.PID); err == nil {
		t.Error("a zombie was opened")
	}
	_ = cmd.Wait()
	if _, err := OpenProcess(p.PID); err == nil {
		t.Error("a process that is gone was opened")
	}
}

func TestProcessClose(t *testing.T) {
	_, p := qemu(t)
	done := p.Done()
	p.Close()
	<-done
	if p.Alive() {
		t.Error("alive after Close")
	}
}

// Watching a thousand processes costs no thread each.
func TestProcessDoneHoldsNoThread(t *testing.T) {
	before := pprof.Lookup("threadcreate").Count()
	for range 200 {
		p, err := OpenProcess(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		p.Done()
	}
	for range 100 {
		runtime.Gosched()
	}
	if more := pprof.Lookup("threadcreate").Count() - before; more > 50 {
		t.Errorf("%d threads for 200 processes", more)
	}
}

func TestProcessRuns(t *testing.T) {
	const other = "99999999-2222-3333-4444-555555555555"
	_, p := qemu(t, "-name", "guest=web1,debug-threads=on", "-S", "-uuid", testUUID, "-accel", "kvm")
	if err := p.Runs(testUUID, "web1"); err != nil {
		t.Error(err)
	}
	if err := p.Runs(other, "web1"); !errors.Is(err, ErrOtherProcess) {
		t.Errorf("another's UUID under our name: %v", err)
	}
	if got := p.Origin(); got != OriginCold {
		t.Errorf("origin %q", got)
	}
	_, p = qemu(t, "-uuid", testUUID, "-incoming", "defer")
	if got := p.Origin(); got != OriginIncoming {
		t.Errorf("origin %q of a restored one", got)
	}
	_, p = qemu(t, "-m", "64")
	if err := p.Runs(testUUID, "web1"); !errors.Is(err, ErrOtherProcess) {
		t.Errorf("a process of no domain: %v", err)
	}
}

func TestNamesDomain(t *testing.T) {
	for _, c := range []struct {
		args string
		want bool
	}{
		{"-name guest=web1,debug-threads=on", true},
		{"-name guest=web1", true},
		{"-name guest=web10", false},
		{"-name guest=web1,,x", false},
		{"-uuid " + testUUID + " -name guest=other", true},
		{"-uuid", false},
		{"-name", false},
		{"", false},
	} {
		if got := namesDomain(strings.Fields(c.args), testUUID, "web1"); got != c.want {
			t.Errorf("%q: %v", c.args, got)
		}
	}
	if !namesDomain([]string{"-name", "guest=a,,b,debug-threads=on"}, testUUID, "a,b") {
		t.Error("a name with a comma is not found")
	}
}

func TestReadPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "web1.pid")
	for content, want := range map[string]int{"4711": 4711, "4711\n": 4711, "": 0, "0": 0, "-4": 0, "x": 0, "4194305": 0, "4711 4712": 0, strings.Repeat("1", 100): 0} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadPIDFile(path)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v", content, got, err)
		}
	}
	if _, err := ReadPIDFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestParseStartTime(t *testing.T) {
	fields := "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21\n"
	for stat, want := range map[string]uint64{
		"17 (qemu) " + fields:         4242,
		"17 (a) b) R 1 (c) " + fields: 4242,
		"17 (qemu) S 1 2 3":           0,
		"17 qemu " + fields:           0,
		"":                            0,
		"17 (qemu)":                   0,
		"17 (q) " + fields[:len(fields)-11] + "x": 0,
	} {
		got, err := parseStartTime([]byte(stat))
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v", stat, got, err)
		}
	}
}

func TestSinceStart(t *testing.T) {
	since, err := SinceStart()
	if err != nil || since < 0 || since > time.Hour {
		t.Errorf("%v, %v", since, err)
	}
}
