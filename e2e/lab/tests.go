package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
)

const (
	// memory of a host VM, in MiB
	memory = 4096
	// spareMemory is what the machine keeps for itself, in MiB, when it runs several.
	spareMemory = 2048
	// maxHosts is how many host VMs run at once at most.
	maxHosts = 4
	// tries is how often a test is begun at most, when the emulated host VM ends in it.
	tries = 3
	// endOfTest begins the line that follows a test's output, ASCII's record separator; the test's status is the rest of it.
	endOfTest = "\x1e"
)

// chosen takes the pattern that chooses tests out of a test binary's arguments.
func chosen(args []string) (others []string, pattern string) {
	for _, arg := range args {
		if p, ok := strings.CutPrefix(arg, "-test.run="); ok {
			pattern = p
		} else {
			others = append(others, arg)
		}
	}
	return others, pattern
}

// listTests returns one line for each test that the pattern chooses, a pattern for this one alone.
func listTests(pattern string) ([]byte, error) {
	pattern, subtests, _ := strings.Cut(pattern, "/")
	if subtests != "" {
		subtests = "/" + subtests
	}
	out, err := exec.Command("bin/e2e.test", "-test.list", cmp.Or(pattern, ".")).Output()
	if err != nil {
		return nil, fmt.Errorf("listing the tests: %w", err)
	}
	var list bytes.Buffer
	for name := range strings.Lines(string(out)) {
		if name = strings.TrimSpace(name); strings.HasPrefix(name, "Test") {
			fmt.Fprintf(&list, "^%s$%s\n", name, subtests)
		}
	}
	if list.Len() == 0 {
		return nil, fmt.Errorf("no test matches %q", pattern)
	}
	return list.Bytes(), nil
}

// suite is the tests of one run: those that are still to be begun, and what became of the others. Its methods may be called
// concurrently.
type suite struct {
	repeat bool   // whether a test in which the host VM ended may be begun again
	title  func() // called before the first test
	out    io.Writer

	mu     sync.Mutex
	left   []string
	begun  map[string]int
	passed int
	failed []string
}

// take returns the next test, if there is one.
func (s *suite) take() (test string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.left) == 0 {
		return "", false
	}
	s.title()
	test, s.left = s.left[0], s.left[1:]
	s.begun[test]++
	return test, true
}

// more says whether there are tests to be begun.
func (s *suite) more() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.left) > 0
}

// ended shows what a test printed, all of it at once, and says whether it passed.
func (s *suite) ended(test, output string, status int) (passed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	io.WriteString(s.out, strings.TrimSuffix(output, "PASS\n"))
	if status == 0 {
		s.passed++
		return true
	}
	s.failed = append(s.failed, test)
	return false
}

// lost shows what a test printed in which the host VM ended. It is begun again, but not for ever.
func (s *suite) lost(test, output string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	io.WriteString(s.out, output)
	fmt.Fprintf(s.out, "%17sthe host VM ended in %s\n", "", test)
	if s.repeat && s.begun[test] < tries {
		s.left = append(s.left, test)
	} else {
		s.failed = append(s.failed, test)
	}
}

// result is the exit status of the whole.
func (s *suite) result() (int, error) {
	if len(s.failed) > 0 {
		return exitFailed, fmt.Errorf("%d tests passed, %d failed: %s", s.passed, len(s.failed), strings.Join(s.failed, " "))
	}
	if len(s.left) > 0 {
		return exitNoStatus, fmt.Errorf("%d tests passed, %d were not begun", s.passed, len(s.left))
	}
	fmt.Fprintf(s.out, "lab: ok: %d tests passed\n", s.passed)
	return 0, nil
}

// hosts is how many host VMs run so many tests.
func hosts(tests int) int {
	return max(1, min(tests, runtime.NumCPU(), maxHosts, (totalMemory()-spareMemory)/memory))
}

// totalMemory is the machine's, in MiB.
func totalMemory() int {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	var kib int
	fmt.Fscanf(f, "MemTotal: %d kB", &kib)
	return kib / 1024
}

// runTests runs the share's list of tests in as many host VMs as the machine bears.
func (vm *hostVM) runTests(ctx context.Context, kvm bool) (int, error) {
	list, err := os.ReadFile(vm.path("share/tests"))
	if err != nil {
		return exitFailed, err
	}
	s := &suite{repeat: !kvm, out: vm.progress, left: strings.Fields(string(list)), begun: map[string]int{}}
	slices.Reverse(s.left) // most of the long ones are the last in the list, and no host VM should end long after the others
	total, n := len(s.left), hosts(len(s.left))
	s.title = sync.OnceFunc(func() {
		phase(vm.progress, 4, vm.phases, "tests", fmt.Sprintf("%d, end to end, in %d host VMs", total, n))
	})
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		each := *vm
		if n > 1 {
			each.number = strconv.Itoa(i + 1)
		}
		all.Go(func() { errs[i] = each.work(ctx, s, kvm) })
	}
	all.Wait()
	status, err := s.result()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = errors.Join(err, fmt.Errorf("not all tests had ended after %v", vm.limit))
	}
	return status, errors.Join(append(errs, err)...)
}

// work runs tests until none is left, in one host VM after another if they end by themselves.
func (vm *hostVM) work(ctx context.Context, s *suite, kvm bool) error {
	if err := os.MkdirAll(vm.path(vm.out("")), 0o755); err != nil {
		return err
	}
	runtime.LockOSThread() // the host VM ends with the thread that started it
	for n := 0; ctx.Err() == nil && s.more(); n++ {
		if n == boots || n > 0 && kvm {
			return fmt.Errorf("host VM %s ended by itself %d times", vm.number, n)
		}
		if n > 0 {
			vm.sayRepeat()
		}
		if _, err := vm.boot(ctx, kvm, func(to io.Writer, from *bufio.Reader) error { return vm.converse(ctx, s, to, from) }); err != nil {
			return err
		}
		os.Remove(vm.path(vm.out(".status")))
	}
	return vm.keepCapabilities()
}

// converse names one test after the other to the host VM, and takes what each prints, until none is left or the host VM has ended.
func (vm *hostVM) converse(ctx context.Context, s *suite, to io.Writer, from *bufio.Reader) error {
	log, err := vm.openLog()
	if err != nil {
		return err
	}
	defer log.Close()
	in := bufio.NewReader(io.TeeReader(from, log))
	for test, ok := s.take(); ok; test, ok = s.take() {
		io.WriteString(to, test+"\n") // where the host VM has ended, so has its output
		output, status, ended := readTest(in)
		switch {
		case ctx.Err() != nil:
			return nil
		case !ended:
			s.lost(test, output)
			return nil
		case !s.ended(test, output, status):
			vm.showConsole(vm.progress, true)
		}
	}
	io.WriteString(to, "\n")
	_, err = io.Copy(io.Discard, in)
	return err
}

// readTest reads what a test prints until the line with its status.
func readTest(in *bufio.Reader) (output string, status int, ended bool) {
	var all strings.Builder
	for {
		line, err := in.ReadString('\n')
		before, after, found := strings.Cut(line, endOfTest)
		all.WriteString(before)
		if found {
			status, err := strconv.Atoi(strings.TrimSpace(after))
			return all.String(), status, err == nil
		}
		if err != nil {
			return all.String(), 0, false
		}
	}
}

// keepCapabilities puts what the host VM's libvirt found out anew into the cache.
func (vm *hostVM) keepCapabilities() error {
	return keepCapabilities(vm.tree, filepath.Join(vm.dir, vm.out("")))
}
