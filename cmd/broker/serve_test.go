package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"keybroker/internal/daemon"
)

// TestServe runs whole brokers, each below a folder of its own, as an ordinary user would.
func TestServe(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/serve",
		Setup: func(e *testscript.Env) error {
			e.Setenv("UID", strconv.Itoa(os.Getuid()))
			e.Setenv("PORT", freePort(e.T().(testing.TB)))
			return nil
		},
		Condition: func(c string) (bool, error) {
			if c != "root" {
				return false, fmt.Errorf("unknown condition %q", c)
			}
			return os.Getuid() == 0, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"until": scriptUntil,
			"http":  scriptHTTP,
			"same":  scriptSame,
			"hup":   scriptHUP,
		},
	})
}

// freePort is a loopback port that nobody listens on.
func freePort(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// until TEXT ARG... runs `keybroker ARG...` until its output has TEXT, for a minute at most.
func scriptUntil(ts *testscript.TestScript, _ bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := runHere(ctx, ts, args[1:])
		if strings.Contains(out, args[0]) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			ts.Fatalf("%q did not come; the last output: %s %v", args[0], out, err)
		}
	}
}

// runHere runs one command line of keybroker in this process.
func runHere(ctx context.Context, ts *testscript.TestScript, args []string) (string, error) {
	var out bytes.Buffer
	for n, a := range args {
		if n > 0 && args[n-1] == "--state-dir" {
			args[n] = ts.MkAbs(a)
		}
	}
	g := &globals{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
	if status := run(ctx, g, args); status != 0 {
		return out.String(), fmt.Errorf("exit status %d", status)
	}
	return out.String(), nil
}

// http STATUS URL [HEADER: VALUE ...] asks over TCP, and writes the answer's body to the file `body`.
func scriptHTTP(ts *testscript.TestScript, _ bool, args []string) {
	r, err := http.NewRequest(http.MethodGet, args[1], nil)
	ts.Check(err)
	for _, h := range args[2:] {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
		if name == "Host" {
			r.Host = value
		}
	}
	response, err := (&http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	ts.Check(err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("body"), body, 0o600))
	if strconv.Itoa(response.StatusCode) != args[0] {
		ts.Fatalf("status %d, expected %s: %s", response.StatusCode, args[0], body)
	}
}

// hup DIR sends SIGHUP to the broker of a state folder.
func scriptHUP(ts *testscript.TestScript, _ bool, args []string) {
	g := &globals{stateDir: ts.MkAbs(args[0])}
	var s daemon.Status
	ts.Check(g.ask(context.Background(), http.MethodGet, "/v1/status", &s))
	ts.Check(unix.Kill(s.PID, unix.SIGHUP))
}

// same A B compares two files' octets without showing them.
func scriptSame(ts *testscript.TestScript, neg bool, args []string) {
	a, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	b, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	if bytes.Equal(a, b) == neg {
		ts.Fatalf("%s and %s are equal: %v", args[0], args[1], !neg)
	}
}
