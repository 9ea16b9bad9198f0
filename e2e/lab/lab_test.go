package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestCommandIsQuotedForBash(t *testing.T) {
	const command = `echo 'a  b' "$HOME" \ $(true); exit 3`
	out, err := exec.Command("bash", "-c", "printf %s "+quoteAll([]string{command})).Output()
	if err != nil || string(out) != command {
		t.Errorf("bash reads %q, %v; want %q", out, err, command)
	}
}

func TestJobIsRefused(t *testing.T) {
	for _, args := range [][]string{{"run"}, {"run", ""}, {"run", "a", "b"}, {"dance"}} {
		if j, err := parseJob(args); err == nil {
			t.Errorf("parseJob(%q) = %+v, want an error", args, j)
		}
	}
}

func TestDependencies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "modules.dep")
	content := "kernel/a/dm-crypt.ko.xz: kernel/a/dm-mod.ko.xz\nkernel/a/dm-mod.ko.xz:\n"
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := readDependencies(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"kernel/a/dm-crypt.ko.xz", "kernel/a/dm-mod.ko.xz"}; !slices.Equal(got["dm_crypt"], want) {
		t.Errorf("dm_crypt = %q, want %q", got["dm_crypt"], want)
	}
}

func TestTailIsTheLastLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(strings.Repeat("early\n", 30)+"late\r\nlast\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	printTail(&out, path, 2)
	if got := out.String(); got != "  late\n  last\n" {
		t.Errorf("the tail is %q", got)
	}
}

func TestAnotherHostVMDoesTheRest(t *testing.T) {
	vm := &hostVM{dir: t.TempDir(), mode: "test"}
	if err := os.Mkdir(vm.out(""), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, content string) {
		if err := os.WriteFile(vm.out(name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("output.log", "=== RUN   TestA\n--- PASS: TestA (1.00s)\n    --- PASS: TestA/b (0.10s)\n--- PASS: TestC (2.00s)\n=== RUN   TestD\n")
	if !vm.mayRepeat(true) {
		t.Error("a host VM that ended by itself is not repeated")
	}
	if skip, err := os.ReadFile(vm.out(".skip")); string(skip) != "^(TestA|TestC)$" {
		t.Errorf("skipped: %s, %v", skip, err)
	}
	write("output.log", "--- PASS: TestA (1.00s)\n--- FAIL: TestC (2.00s)\n=== RUN   TestD\n")
	if vm.mayRepeat(true) {
		t.Error("repeated after a failure")
	}
	vm.mode = "run"
	if vm.mayRepeat(true) || !vm.mayRepeat(false) {
		t.Error("a user's command is repeated once it was started, or not before")
	}
	write(".status", "0\n")
	if vm.mayRepeat(false) {
		t.Error("repeated after its end")
	}
}

func TestDetachEndsTheKeyboard(t *testing.T) {
	var out bytes.Buffer
	copyUntilDetach(&out, strings.NewReader("ls\x1drm"))
	if got := out.String(); got != "ls" {
		t.Errorf("the host VM got %q", got)
	}
}
