//go:build linux

package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mdlayher/vsock"
)

// The test binary is the program itself when it is told so: what is tested is what ships, in a process of its own.
func TestMain(m *testing.M) {
	if os.Getenv("KEYBROKER_AGENT_TEST_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// program runs keybroker-agent and gives its exit status and output.
func program(t *testing.T, args ...string) (int, string) {
	t.Helper()
	c := exec.Command(os.Args[0], args...)
	c.Env = []string{"KEYBROKER_AGENT_TEST_MAIN=1"}
	out, err := c.CombinedOutput()
	exit := (*exec.ExitError)(nil)
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), string(out)
}

func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, bad := file("good.toml", goodConfig), file("bad.toml", goodConfig+"colour = 1\n")
	cases := []struct {
		args []string
		exit int
		want string
	}{
		{[]string{"-config", good, "-check"}, exitOK, "ok: 3 keys, 1 pin\n"},
		{[]string{"-version"}, exitOK, "keybroker-agent"},
		{[]string{"-h"}, exitOK, "usage:"},
		{[]string{"-config", bad, "-check"}, exitUsage, `:23: unknown key "colour" in [[key]]`},
		{[]string{"-config", filepath.Join(dir, "absent")}, exitUsage, "no such file"},
		{[]string{"-colour"}, exitUsage, "not defined"},
		{[]string{"now"}, exitUsage, "none is expected"},
		{[]string{"-forget"}, exitUsage, "-once"},
		{[]string{"-config", good, "-state-dir", filepath.Join(dir, "state")}, exitFailed, "keybroker-agent: error:"},
	}
	for _, c := range cases {
		exit, out := program(t, c.args...)
		if exit != c.exit || !strings.Contains(out, c.want) {
			t.Errorf("%v: exit status %d, expected %d with %q; output:\n%s", c.args, exit, c.exit, c.want, out)
		}
		if c.exit == exitUsage && strings.Count(out, "\n") != 1 {
			t.Errorf("%v: a mistake takes more than a line:\n%s", c.args, out)
		}
	}
}

func TestDeadlineIsExitStatus1(t *testing.T) {
	if _, err := os.Stat("/dev/vsock"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs root, for a vsock port below 1024, and the kernel's vsock: modprobe vsock, or run it in the lab")
	}
	path := filepath.Dir(keyPath(t))
	text := strings.Replace(goodConfig, "5m", "200ms", 1)
	config := filepath.Join(path, "agent.toml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	exit, out := program(t, "-config", config, "-state-dir", filepath.Join(path, "state"))
	if exit != exitFailed || !strings.Contains(out, "waiting for the broker (pin ed25519:AAECAwQF...) on vsock port 720 for keys disk, web") {
		t.Errorf("exit status %d, output:\n%s", exit, out)
	}
	for _, want := range []string{"hint: ", "without keys disk, web", "deadline is over"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the output:\n%s", want, out)
		}
	}
}

func TestOnlyTheHostsRootIsListenedTo(t *testing.T) {
	for peer, want := range map[vsock.Addr]bool{
		{ContextID: 2, Port: 1023}:    true,
		{ContextID: 2, Port: 1}:       true,
		{ContextID: 2, Port: 1024}:    false,
		{ContextID: 1, Port: 700}:     false,
		{ContextID: 3, Port: 700}:     false,
		{ContextID: 0, Port: 700}:     false,
		{ContextID: 2, Port: 1 << 31}: false,
	} {
		if fromHost(&peer) != want {
			t.Errorf("%v: %v, expected %v", &peer, !want, want)
		}
	}
	if fromHost(nil) {
		t.Error("a peer without an address")
	}
}

func TestConsoleHoldsRepeatsBack(t *testing.T) {
	var out bytes.Buffer
	c := newConsole(&out)
	for range 1000 {
		c.sayOnce("peer", "closed a connection")
	}
	c.say("something else")
	if n := strings.Count(out.String(), "\n"); n != 2 {
		t.Errorf("%d lines, expected 2:\n%s", n, out.String())
	}
}
