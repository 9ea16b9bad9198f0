package main

import (
	"bufio"
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

func TestWhatIsRepeated(t *testing.T) {
	vm := &hostVM{dir: t.TempDir(), mode: "run"}
	if vm.mayRepeat(true) || !vm.mayRepeat(false) {
		t.Error("a user's command is repeated once it was started, or not before")
	}
	vm.mode = "demo"
	if !vm.mayRepeat(true) {
		t.Error("a demonstration whose host VM ended by itself is not repeated")
	}
	if err := os.MkdirAll(vm.path("out"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vm.path(vm.out(".status")), []byte("0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if vm.mayRepeat(false) {
		t.Error("repeated after its end")
	}
}

// talk is a host VM's side of the port: what it prints, and what it is told.
func talk(t *testing.T, s *suite, prints string) (told string) {
	t.Helper()
	vm := &hostVM{dir: t.TempDir(), mode: "test", progress: s.out}
	if err := os.Mkdir(vm.path("out"), 0o755); err != nil {
		t.Fatal(err)
	}
	var to strings.Builder
	if err := vm.converse(t.Context(), s, &to, bufio.NewReader(strings.NewReader(prints))); err != nil {
		t.Error(err)
	}
	return to.String()
}

// Tests that have ended are not begun again, whatever became of them; one in which the host VM ended is, and not for ever.
func TestSuite(t *testing.T) {
	var shown bytes.Buffer
	s := &suite{repeat: true, title: func() {}, out: &shown, left: []string{"^TestA$", "^TestB$", "^TestC$"}, begun: map[string]int{}}
	if told := talk(t, s, "a passes\nPASS\n\x1e0\nb fails\n\x1e1\nc is cut"); told != "^TestA$\n^TestB$\n^TestC$\n" {
		t.Errorf("the first host VM was told %q", told)
	}
	if told := talk(t, s, "c is cut again\n"); told != "^TestC$\n" {
		t.Errorf("the second host VM was told %q", told)
	}
	if told := talk(t, s, "c passes\n\x1e0\n"); told != "^TestC$\n\n" {
		t.Errorf("the third host VM was told %q, expected the last test and the end", told)
	}
	if got := shown.String(); !strings.Contains(got, "a passes\nb fails\n") || !strings.Contains(got, "c passes\n") {
		t.Errorf("shown: %s", got)
	}
	if status, err := s.result(); status != exitFailed || err == nil || err.Error() != "2 tests passed, 1 failed: ^TestB$" {
		t.Errorf("%d, %v", status, err)
	}

	s = &suite{repeat: true, title: func() {}, out: &shown, left: []string{"^TestA$"}, begun: map[string]int{}}
	for n := 0; s.more(); n++ {
		if n == 9 {
			t.Fatal("a test in which the host VM always ends is begun for ever")
		}
		talk(t, s, "")
	}
	if status, err := s.result(); status != exitFailed || err == nil {
		t.Errorf("a test that never ended: %d, %v", status, err)
	}
	s = &suite{out: &shown, begun: map[string]int{}}
	if status, err := s.result(); status != 0 || err != nil {
		t.Errorf("no failure: %d, %v", status, err)
	}
}

func TestPatternIsTakenOut(t *testing.T) {
	if others, pattern := chosen([]string{"-kill=all", "-test.run=^TestA$/b"}); !slices.Equal(others, []string{"-kill=all"}) || pattern != "^TestA$/b" {
		t.Errorf("%q, %q", others, pattern)
	}
}

func TestDetachEndsTheKeyboard(t *testing.T) {
	var out bytes.Buffer
	copyUntilDetach(&out, strings.NewReader("ls\x1drm"))
	if got := out.String(); got != "ls" {
		t.Errorf("the host VM got %q", got)
	}
}
