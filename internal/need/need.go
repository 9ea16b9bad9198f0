// Package need has what a test says of a machine that lacks something.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// That skips a test on a machine that has not what it needs, and says what that is. With CI=true the test fails: there nothing is
// skipped. What a CI machine need not have, because the lab does, is skipped by other means.
func That(t testing.TB, has bool, what string, args ...any) {
	t.Helper()
	switch {
	case has:
	case os.Getenv("CI") == "true":
		t.Fatalf("CI=true needs "+what, args...)
	default:
		t.Skipf("needs "+what, args...)
	}
}

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	That(t, os.Geteuid() == 0, "root: run the tests as root")
}

// Program needs a program that is in the package of its own name.
func Program(t testing.TB, name string) {
	t.Helper()
	_, err := exec.LookPath(name)
	That(t, err == nil, "%[1]s: apt-get install %[1]s", name)
}
