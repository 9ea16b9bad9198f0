package daemon

import (
	"bufio"
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/inject"
	"keybroker/internal/config"
)

// ends are the two ends of a Unix socket pair.
func ends(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var both []*net.UnixConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		both = append(both, c.(*net.UnixConn))
	}
	return both[0], both[1]
}

// said sends octets to a door that answers "/" with what it got, and returns what the door says until it closes the connection.
func said(t testing.TB, octets []byte) (answers []byte, asked int) {
	t.Helper()
	var log bytes.Buffer
	d := &door{
		route: func(w http.ResponseWriter, r *http.Request) {
			asked++
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, r.Method)
		},
		conns:    newConns(nil, &config.Limits{Connections: 8, ConnectionsPerCaller: 8}, func(uint32) bool { return true }),
		log:      slog.New(slog.NewTextHandler(&log, nil)),
		headTime: time.Minute, idleTime: time.Minute, writeTime: time.Minute,
	}
	ours, theirs := ends(t)
	go func() {
		ours.Write(octets)
		ours.CloseWrite()
	}()
	served := make(chan struct{})
	go func() {
		defer close(served)
		d.serve(d.conns.identify(t.Context(), theirs), theirs)
	}()
	ours.SetReadDeadline(time.Now().Add(time.Minute))
	answers, err := io.ReadAll(ours)
	if err != nil && !strings.Contains(err.Error(), "reset") {
		t.Fatalf("the door does not close: %v", err)
	}
	<-served
	if log.Len() > 0 {
		t.Errorf("the log says %s", log.String())
	}
	return answers, asked
}

// statuses are those of all answers, each of which is whole.
func statuses(t testing.TB, answers []byte) (all []int) {
	t.Helper()
	for in := bufio.NewReader(bytes.NewReader(answers)); ; {
		if _, err := in.Peek(1); err != nil {
			return all
		}
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatalf("no answer: %v in %q", err, answers)
		}
		if _, err := io.ReadAll(r.Body); err != nil {
			t.Fatalf("an answer that is cut: %v in %q", err, answers)
		}
		all = append(all, r.StatusCode)
	}
}

// Requests that come all at once are answered one after the other, up to the first that is the last by its own word or by its faults.
func TestDoorAnswersInTurn(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, c := range []struct {
		name, octets string
		want         []int
	}{
		{"three", get + get + get, []int{200, 200, 200}},
		{"a last one", get + "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + get, []int{200, 200}},
		{"HTTP/1.0", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + get, []int{200}},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{505}},
		{"no host", get + "GET / HTTP/1.1\r\n\r\n" + get, []int{200, 400}},
		{"a header that looks like another", "GET / HTTP/1.1\r\nHost: x\r\nOrigin : y\r\n\r\n" + get, []int{400}},
		{"a body that hides a request", "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n" + get + get, []int{200}},
		{"half a request", get + "GET / HT", []int{200, 400}},
		{"eight KiB and more in all", strings.Repeat(get, 1000), slices.Repeat([]int{200}, 1000)},
	} {
		answers, _ := said(t, []byte(c.octets))
		if got := statuses(t, answers); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, expected %v", c.name, got, c.want)
		}
	}
}

// A keyholder that hangs costs its callers their answer, and not the broker their connections.
func TestHungKeyholder(t *testing.T) {
	broker, _, path := startBroker(t, impatient)
	pid := broker.status().Realm.HolderPID
	if pid == 0 {
		t.Fatal("there is no keyholder")
	}
	stop := func(s unix.Signal) {
		t.Helper()
		if err := unix.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
	stop(unix.SIGSTOP)
	t.Cleanup(func() { unix.Kill(pid, unix.SIGCONT) })
	if status, code, err := dialRaw(t, path).ask(getting("/v1/keys/db", ours)); status != http.StatusInternalServerError || err != nil {
		t.Errorf("a keyholder that hangs: %d, %q, %v", status, code, err)
	}
	stop(unix.SIGCONT)
	for status, code, err := 0, inject.Code(""), error(nil); status != http.StatusOK; { // it works off what was asked before
		if status, code, err = dialRaw(t, path).ask(getting("/v1/keys/db", ours)); err != nil || code != "" && code != inject.CodeInternal {
			t.Fatalf("afterwards: %d, %q, %v", status, code, err)
		}
	}
}

// Whatever comes in, the door closes in the end, says nothing but whole answers, and no more of them than it was asked for and one
// refusal.
func FuzzDoor(f *testing.F) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, octets := range []string{get, get + get, "\r\n" + get, "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + get, "HEAD / HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "\x16\x03\x01", strings.Repeat("a", 9000)} {
		f.Add([]byte(octets))
	}
	f.Fuzz(func(t *testing.T, octets []byte) {
		if bytes.Contains(octets, []byte("HEAD")) {
			t.Skip("its answers have no body, which only who asked knows")
		}
		answers, asked := said(t, octets)
		if n := len(statuses(t, answers)); n > asked+1 || n < asked {
			t.Errorf("%d answers to %d requests", n, asked)
		}
	})
}
