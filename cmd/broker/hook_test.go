package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keybroker/hypervisor"
	"keybroker/internal/config"
)

const hookUUID = "11111111-2222-3333-4444-555555555555"

// hookXML is a domain's definition with this in its metadata.
func hookXML(metadata string) string {
	return "<domain><name>web1</name><uuid>" + hookUUID + "</uuid><metadata>" + metadata +
		"</metadata><devices><vsock><cid auto='yes' address='42'/></vsock></devices></domain>"
}

var hookOurs = hookXML(`<k:domain xmlns:k="` + hypervisor.Namespace + `"><k:key name="disk"/><k:key name="app"/></k:domain>`)

// hookBroker serves a hook socket below a state directory. It returns the directory and what was posted.
func hookBroker(t *testing.T, status int, answer string) (dir string, posted chan []byte) {
	dir, posted = t.TempDir(), make(chan []byte, 10)
	paths, err := config.PathsUnder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(paths.HookSocket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", paths.HookSocket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.URL.Path != "/v1/hook" {
			t.Errorf("%s %s, %v", r.Method, r.URL, err)
		}
		posted <- body
		w.WriteHeader(status)
		_, _ = io.WriteString(w, answer)
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return dir, posted
}

// callHook runs the whole command line, as libvirt's script does in a process of its own. The one of this test is older, and a
// slow machine gets half a minute more than libvirt would give.
func callHook(t *testing.T, stdin io.Reader, args ...string) (status int, stderr string) {
	t.Helper()
	return callHookBegan(t, hypervisor.BootTime()+30*time.Second, stdin, args...)
}

func callHookBegan(t *testing.T, began time.Duration, stdin io.Reader, args ...string) (status int, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	g := &globals{stdin: stdin, stdout: &out, stderr: &errs, began: began}
	status = run(t.Context(), g, args)
	if out.Len() > 0 {
		t.Errorf("%q on stdout, which libvirt would take for a definition", out.String())
	}
	return status, errs.String()
}

// What the hook cannot do is in the system log: of a hook that does not fail libvirt shows nobody what it printed. A log that takes
// nothing, or is none, does not hold the start up.
func TestHookWritesToTheSystemLog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "log")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	warn := func(syslog string) {
		t.Helper()
		var out, errs bytes.Buffer
		g := &globals{stdin: strings.NewReader(hookOurs), stdout: &out, stderr: &errs, began: hypervisor.BootTime(), syslog: syslog}
		status := run(t.Context(), g, []string{"--state-dir", t.TempDir(), "hook", "qemu", "--", "--state-dir", t.TempDir(), "web1", "prepare", "begin", "-"})
		if status != 0 || !strings.HasPrefix(errs.String(), "keybroker: warning: hook: no broker serves ") {
			t.Errorf("status %d, %q", status, errs.String())
		}
	}
	warn(filepath.Join(filepath.Dir(socket), "none"))
	warn(socket)
	l.SetReadDeadline(time.Now().Add(time.Minute))
	octets := make([]byte, 4096)
	n, err := l.Read(octets)
	if text := string(octets[:n]); err != nil || !strings.HasPrefix(text, "<28>") || !strings.Contains(text, "]: warning: hook: no broker serves ") || strings.Contains(text, "\n") {
		t.Errorf("logged: %q, %v", text, err)
	}
	for range 1000 { // until the log is full; each waits for it a little at most
		c, err := net.DialTimeout("unixgram", socket, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = c.Write(octets)
		c.Close()
		if err != nil {
			warn(socket)
			return
		}
	}
	t.Error("the log took everything")
}

func TestHookTellsTheBroker(t *testing.T) {
	for _, operation := range []string{"prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach"} {
		dir, posted := hookBroker(t, http.StatusNoContent, "")
		status, stderr := callHook(t, strings.NewReader(hookOurs), "--state-dir", dir, "hook", "qemu", "web1", operation, "begin", "-")
		if status != 0 || stderr != "" {
			t.Fatalf("%s: status %d, %q", operation, status, stderr)
		}
		got, err := hypervisor.ParseHookEvent(<-posted)
		if err != nil {
			t.Fatal(err)
		}
		if got.At <= 0 {
			t.Errorf("%s: called at %d", operation, got.At)
		}
		got.At = 0
		want := hypervisor.HookEvent{Operation: operation, Suboperation: "begin", Extra: "-", UUID: hookUUID, Name: "web1", CID: 42, Offered: []string{"disk", "app"}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

// The process is told where libvirt has one.
func TestHookProcess(t *testing.T) {
	h := &qemuHook{runDir: t.TempDir()}
	if err := os.WriteFile(filepath.Join(h.runDir, "web1.pid"), []byte("4711"), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := hypervisor.ParseDomain([]byte(hookOurs))
	if err != nil {
		t.Fatal(err)
	}
	for operation, want := range map[string]int{"prepare": 0, "start": 0, "started": 4711, "stopped": 0, "reconnect": 4711} {
		if e := h.event(d, []string{"web1", operation, "begin", "-"}); e.PID != want {
			t.Errorf("%s: process %d", operation, e.PID)
		}
	}
}

func TestHookRefusal(t *testing.T) {
	const answer = `{"code":"no-policy","reason":"no entry for this VM\nadd one"}`
	for _, operation := range []string{"prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach"} {
		dir, _ := hookBroker(t, http.StatusForbidden, answer)
		status, stderr := callHook(t, strings.NewReader(hookOurs), "--state-dir", dir, "hook", "qemu", "--", "web1", operation, "begin", "-")
		want := 0
		if operation == "prepare" {
			want = 1
		}
		if status != want {
			t.Errorf("%s: status %d, want %d", operation, status, want)
		}
		if !strings.Contains(stderr, "no entry for this VM add one (no-policy)") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: %q", operation, stderr)
		}
	}
}

// Whatever else the broker answers is no reason to fail.
func TestHookOddAnswers(t *testing.T) {
	for title, answer := range map[string]struct {
		status int
		body   string
	}{
		"an error":                {http.StatusInternalServerError, "oh"},
		"a refusal as an error":   {http.StatusInternalServerError, `{"code":"x","reason":"x"}`},
		"a bad request":           {http.StatusBadRequest, "what?"},
		"forbidden by others":     {http.StatusForbidden, "go away"},
		"a refusal without code":  {http.StatusForbidden, `{"code":"","reason":"x"}`},
		"a refusal with more":     {http.StatusForbidden, `{"code":"x","reason":"x","more":1}`},
		"an endless answer":       {http.StatusForbidden, strings.Repeat("x", 1<<20)},
		"a redirection to itself": {http.StatusNotModified, ""},
	} {
		dir, _ := hookBroker(t, answer.status, answer.body)
		status, stderr := callHook(t, strings.NewReader(hookOurs), "--state-dir", dir, "hook", "qemu", "web1", "prepare", "begin", "-")
		if status != 0 || !strings.HasPrefix(stderr, "keybroker: warning: hook: ") || strings.Count(stderr, "\n") != 1 || len(stderr) > 800 {
			t.Errorf("%s: status %d, %q", title, status, stderr)
		}
	}
}

// unasked is a socket function for calls in which no broker may be asked.
func unasked(t *testing.T) func([]string) (string, error) {
	return func([]string) (string, error) {
		t.Error("the broker's socket is looked for")
		return "", errors.New("no")
	}
}

func TestHookIgnoresOthers(t *testing.T) {
	for title, definition := range map[string]string{
		"no metadata":                 hookXML(""),
		"others' metadata":            hookXML(`<a:b xmlns:a="urn:other"/>`),
		"our namespace in a comment":  hookXML("<!-- " + hypervisor.Namespace + " -->"),
		"no definition":               "",
		"no XML":                      "hello",
		"huge, and not ours":          hookXML(strings.Repeat("<x/>", hypervisor.MaxDomainXML)),
		"two CIDs, but not ours":      strings.Replace(hookXML(""), "</vsock>", "<cid address='3'/></vsock>", 1),
		"a namespace of a later kind": hookXML(`<k:domain xmlns:k="urn:keybroker:domain:2"/>`),
	} {
		var stderr bytes.Buffer
		h := &qemuHook{stdin: strings.NewReader(definition), socket: unasked(t)}
		if err := h.run(t.Context(), []string{"web1", "prepare", "begin", "-"}, &stderr); err != nil || stderr.Len() > 0 {
			t.Errorf("%s: %v, %q", title, err, stderr.String())
		}
	}
}

// Bad input never breaks a start, and is told in one line.
func TestHookBadInput(t *testing.T) {
	good := []string{"web1", "prepare", "begin", "-"}
	cases := map[string]struct {
		definition string
		args       []string
	}{
		"bad metadata":            {strings.Replace(hookOurs, "disk", "DISK\n", 1), good},
		"two CIDs":                {strings.Replace(hookOurs, "</vsock>", "<cid address='3'/></vsock>", 1), good},
		"cut":                     {hookOurs[:len(hookOurs)-30], good},
		"huge":                    {strings.Replace(hookOurs, "<devices>", strings.Repeat("<x/>", hypervisor.MaxDomainXML)+"<devices>", 1), good},
		"no arguments":            {hookOurs, nil},
		"three arguments":         {hookOurs, good[:3]},
		"of another domain":       {hookOurs, []string{"web2", "prepare", "begin", "-"}},
		"an unknown operation":    {hookOurs, []string{"web1", "explode", "begin", "-"}},
		"an unknown flag":         {hookOurs, append([]string{"--nonsense"}, good...)},
		"a flag without a value":  {hookOurs, append([]string{"--config"}, "web1", "prepare", "-", "-")},
		"a state dir that is not": {hookOurs, append([]string{"--state-dir", "/nonexistent"}, good...)},
		"a name like a flag":      {strings.Replace(hookOurs, "web1", "--help", 1), []string{"--help", "explode", "begin", "-"}},
	}
	for title, c := range cases {
		status, stderr := callHook(t, strings.NewReader(c.definition), append([]string{"hook", "qemu"}, c.args...)...)
		if status != 0 || !strings.HasPrefix(stderr, "keybroker: warning: hook: ") || strings.Count(stderr, "\n") != 1 || len(stderr) > 800 {
			t.Errorf("%s: status %d, %q", title, status, stderr)
		}
	}
}

// What contradicts itself is not passed on.
func TestHookOfAnotherDomain(t *testing.T) {
	var stderr bytes.Buffer
	h := &qemuHook{stdin: strings.NewReader(hookOurs), socket: unasked(t)}
	if err := h.run(t.Context(), []string{"web2", "prepare", "begin", "-"}, &stderr); err != nil || stderr.Len() == 0 {
		t.Errorf("%v, %q", err, stderr.String())
	}
}

// A domain may be called anything.
func TestHookNamesLikeFlags(t *testing.T) {
	for _, name := range []string{"-x", "--help", "--config", "hook", "qemu", "a b"} {
		dir, posted := hookBroker(t, http.StatusNoContent, "")
		definition := strings.Replace(hookOurs, "web1", name, 1)
		for _, dash := range [][]string{nil, {"--"}} {
			args := append(append([]string{"--state-dir=" + dir, "hook", "qemu"}, dash...), name, "prepare", "begin", "-")
			if status, stderr := callHook(t, strings.NewReader(definition), args...); status != 0 || stderr != "" {
				t.Fatalf("%q: status %d, %q", args, status, stderr)
			}
			if e, err := hypervisor.ParseHookEvent(<-posted); err != nil || e.Name != name {
				t.Errorf("%q: told of %q, %v", args, e.Name, err)
			}
		}
	}
}

func TestHookNoBroker(t *testing.T) {
	dir, _ := hookBroker(t, http.StatusNoContent, "")
	paths, err := config.PathsUnder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(paths.HookSocket); err != nil {
		t.Fatal(err)
	}
	for _, operation := range []string{"prepare", "reconnect"} {
		status, stderr := callHook(t, strings.NewReader(hookOurs), "--state-dir", dir, "hook", "qemu", "web1", operation, "begin", "-")
		if status != 0 || !strings.Contains(stderr, "no broker serves") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: status %d, %q", operation, status, stderr)
		}
	}
}

// silent listens and never answers, as a stopped broker does.
func silent(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "hook.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path
}

// The hook takes no longer than a second, whoever does not answer it.
func TestHookIsBounded(t *testing.T) {
	socket := silent(t)
	never, closeNever := io.Pipe()
	defer closeNever.Close()
	for title, stdin := range map[string]io.Reader{"a silent broker": strings.NewReader(hookOurs), "a silent libvirt": never} {
		h := &qemuHook{stdin: stdin, socket: func([]string) (string, error) { return socket, nil }}
		var stderr bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		begin := time.Now()
		err := h.run(ctx, []string{"web1", "prepare", "begin", "-"}, &stderr)
		cancel()
		if err != nil || strings.Count(stderr.String(), "\n") != 1 {
			t.Errorf("%s: %v, %q", title, err, stderr.String())
		}
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s: took %v", title, took)
		}
	}
	if hookBudget >= hypervisor.HookLife {
		t.Errorf("a budget of %v of %v", hookBudget, hypervisor.HookLife)
	}
}

// The second begins with the process, so that a slow start of it is counted, and nothing older than the process is.
func TestHookCountsFromItsStart(t *testing.T) {
	dir, posted := hookBroker(t, http.StatusNoContent, "")
	args := []string{"--state-dir", dir, "hook", "qemu", "web1", "prepare", "begin", "-"}
	status, stderr := callHookBegan(t, hypervisor.BootTime()-hypervisor.HookLife, strings.NewReader(hookOurs), args...)
	if status != 0 || !strings.HasPrefix(stderr, "keybroker: warning: hook: ") {
		t.Errorf("begun a second ago: status %d, %q", status, stderr)
	}
	began := hypervisor.BootTime()
	if status, stderr = callHookBegan(t, began, strings.NewReader(hookOurs), args...); status != 0 || stderr != "" {
		t.Errorf("begun now: status %d, %q", status, stderr)
	}
	if e, err := hypervisor.ParseHookEvent(<-posted); err != nil || e.At != int64(began) {
		t.Errorf("told of %+v, %v", e, err)
	}
	if own := processBegan(); own <= 0 || own > began {
		t.Errorf("this process began at %v, before %v", own, began)
	}
}

// A bug must not kill a VM either.
func TestHookPanics(t *testing.T) {
	h := &qemuHook{stdin: strings.NewReader(hookOurs), socket: func([]string) (string, error) { panic("oops") }}
	var stderr bytes.Buffer
	if err := h.run(t.Context(), []string{"web1", "reconnect", "begin", "-"}, &stderr); err != nil || !strings.Contains(stderr.String(), "oops") {
		t.Errorf("%v, %q", err, stderr.String())
	}
}

func TestShown(t *testing.T) {
	for in, want := range map[string]string{"a\nb\x1b[2Jc": "a b\uFFFD[2Jc", strings.Repeat("ä", 400): strings.Repeat("ä", 250) + "...", " x\n": "x"} {
		if got := shown(in); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
