package daemon

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"keybroker/inject"
	"keybroker/internal/config"
)

// crowdOf opens as many connections of each user as are admitted, and returns them.
func crowdOf(t *testing.T, c *conns, each int, users ...uint32) (open []net.Conn) {
	t.Helper()
	for _, uid := range users {
		for range each {
			ours, theirs := net.Pipe()
			theirs.Close()
			switch err := c.admit(ours, uid, &peer{}); {
			case err == nil:
				open = append(open, ours)
			case !errors.Is(err, inject.Refusal{Code: inject.CodeBusy}):
				t.Errorf("uid %d: %v", uid, err)
			}
		}
	}
	return open
}

// Users whom policy does not name have a part of the connections, however many they are; those whom it names have all the rest.
func TestStrangersShareAPart(t *testing.T) {
	policyNames := map[uint32]bool{1: true, 2: true, 3: true, 4: true, 5: true}
	c := newConns(nil, &config.Limits{Connections: 64, ConnectionsPerCaller: 16}, func(uid uint32) bool { return policyNames[uid] })
	strangers := crowdOf(t, c, 20, 11, 12, 13, 14, 15, 16, 17, 18)
	if len(strangers) != 8 {
		t.Errorf("%d connections of strangers, expected an eighth of 64", len(strangers))
	}
	named := crowdOf(t, c, 20, 1, 2, 3)
	if len(named) != 48 {
		t.Errorf("%d connections of three users whom policy names, expected 16 of each", len(named))
	}
	if more := crowdOf(t, c, 20, 4, 5); len(more) != 8 {
		t.Errorf("%d connections more, expected 64 in all", len(more))
	} else {
		named = append(named, more...)
	}
	clear(policyNames) // a new policy: who came before it is counted as he was
	for _, conn := range append(named, strangers...) {
		c.closed(conn, http.StateIdle)
		c.closed(conn, http.StateClosed)
		c.closed(conn, http.StateClosed)
	}
	if len(c.open) != 0 || len(c.byUID) != 0 || c.strangers != 0 {
		t.Errorf("afterwards %d connections of %d users, %d of strangers", len(c.open), len(c.byUID), c.strangers)
	}
	if open := crowdOf(t, c, 20, 1, 2); len(open) != 8 {
		t.Errorf("%d connections of users whom policy named once", len(open))
	}
}

// Whoever may read status has some connections of the admin socket, and all such together leave root its own.
func TestLocalConnections(t *testing.T) {
	c := newLocalConns(localPerCaller)
	if n := len(crowdOf(t, c, 40, 1001)); n != 32 {
		t.Errorf("%d connections of one user, expected 32", n)
	}
	if n := len(crowdOf(t, c, 40, 1002, 1003, 1004, 1005)); n != 64 {
		t.Errorf("%d connections of four others, expected 64: 96 in all", n)
	}
	if n := len(crowdOf(t, c, 40, 0)); n != 32 {
		t.Errorf("%d connections of root, expected 32", n)
	}
	if n := len(crowdOf(t, newLocalConns(localConns), 200, 0)); n != 128 {
		t.Errorf("%d connections of the hook, expected 128", n)
	}
}

// The admin socket tells one connection too many why it gets nothing, and closes those that say nothing more.
func TestAdminSocketIsBounded(t *testing.T) {
	broker, _, _ := startBroker(t)
	path := broker.paths.AdminSocket
	ask := getting("/v1/explain?of=db")
	for range localPerCaller {
		if status, code, err := dialRaw(t, path).ask(ask); status != http.StatusOK {
			t.Fatalf("%d, %q, %v", status, code, err)
		}
	}
	more := dialRaw(t, path)
	if status, code, err := more.ask(ask); status != http.StatusTooManyRequests || code != inject.CodeBusy || !more.closed() {
		t.Errorf("one connection more: %d, %q, %v", status, code, err)
	}
	for range 2 * localRefusing {
		dialRaw(t, path) // who does not even ask is not kept for ever more
	}
	if last := dialRaw(t, path); !last.closed() {
		t.Error("connections of one user have no end")
	}
}

// keeps asks for the broker's health, and says whether the connection stays open.
func keeps(t *testing.T, r *raw) bool {
	t.Helper()
	if status, _, err := r.ask(getting("/healthz")); status != http.StatusOK {
		t.Fatalf("health: %d, %v", status, err)
	}
	status, _, _ := r.ask(getting("/healthz"))
	return status == http.StatusOK
}

// Who gets nothing keeps no connection by asking for the broker's health.
func TestHealthOfStrangers(t *testing.T) {
	const most, served = 16, 2 // an eighth
	broker, _, path := startBroker(t, func(b *Broker) {
		b.cfg.Limits.Connections, b.cfg.Limits.ConnectionsPerCaller = most, most
		setPolicy(t, b, "")
	})
	for n := range most {
		if kept := keeps(t, dialRaw(t, path)); kept != (n < served) {
			t.Errorf("connection %d of a stranger: kept open: %v", n+1, kept)
		}
	}
	broker.reload()
	if status, code, err := dialRaw(t, path).ask(getting("/v1/keys/db", ours)); status != http.StatusOK {
		t.Errorf("once policy names the user: %d, %q, %v", status, code, err)
	}
}

// handles counts the handles of processes that this process has.
func handles(t *testing.T) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if is, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(is, "pidfd") {
			n++
		}
	}
	return n
}

// A connection on which nobody asks for a key costs no handle of a process, and one that asked lets go of it.
func TestWhoAsksNothingIsNotLookedAt(t *testing.T) {
	broker, _, path := startBroker(t)
	before := handles(t)
	var crowd []*raw
	for range 10 {
		r := dialRaw(t, path)
		if !keeps(t, r) {
			t.Error("a connection of a user whom policy names is not kept")
		}
		crowd = append(crowd, r)
	}
	if now := handles(t); now != before {
		t.Errorf("%d handles of processes are held for connections that asked for nothing", now-before)
	}
	for range 2 {
		if status, code, err := crowd[0].ask(getting("/v1/keys/db", ours)); status != http.StatusOK {
			t.Fatalf("%d, %q, %v", status, code, err)
		}
	}
	if now := handles(t); now > before+1 {
		t.Errorf("%d handles for one caller", now-before)
	}
	for _, r := range crowd {
		r.Close()
	}
	for open, _, _ := broker.services.conns.counts(); open > 0; open, _, _ = broker.services.conns.counts() {
		runtime.Gosched()
	}
	if now := handles(t); now != before {
		t.Errorf("%d handles are left", now-before)
	}
}

// Neither who gets nothing nor who does not read keeps the broker from stopping.
func TestStopWaitsForNoStranger(t *testing.T) {
	var stopping time.Time
	dial := func(t *testing.T, path string) net.Conn { // it stays open until the broker has stopped
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("broker", func(t *testing.T) {
		var crowd []net.Conn
		t.Cleanup(func() {
			for _, c := range crowd {
				c.Close()
			}
		})
		broker, _, path := startBroker(t, func(b *Broker) {
			b.cfg.Limits.Connections = strangersShare // one stranger
			setPolicy(t, b, "")
		})
		for _, at := range []string{path, path, path, broker.paths.AdminSocket} { // one is admitted, two are to be refused
			c := dial(t, at)
			crowd = append(crowd, c)
			if _, err := c.Write([]byte("GET / HT")); err != nil {
				t.Fatal(err)
			}
		}
		reader := dial(t, broker.paths.AdminSocket)
		crowd = append(crowd, reader)
		reader.SetDeadline(time.Now().Add(time.Second))
		for err := error(nil); err == nil; { // until its answers are stuck
			_, err = reader.Write([]byte(getting("/v1/status")))
		}
		stopping = time.Now()
	})
	if took := time.Since(stopping); took > 3*time.Second {
		t.Errorf("stopping took %v", took)
	}
}

// What policy names is let finish when the broker stops, and what strangers have is closed, also if it comes later.
func TestEndClosesStrangers(t *testing.T) {
	c := newConns(nil, &config.Limits{Connections: 64, ConnectionsPerCaller: 16}, func(uid uint32) bool { return uid == 1 })
	is := func(open net.Conn) bool { // a pipe whose other end is closed tells
		_, err := open.Read(make([]byte, 1))
		return !errors.Is(err, io.ErrClosedPipe)
	}
	named, strangers := crowdOf(t, c, 2, 1), crowdOf(t, c, 2, 2)
	c.end()
	for _, open := range named {
		if !is(open) {
			t.Error("a connection that policy names is closed")
		}
	}
	for _, open := range strangers {
		if is(open) {
			t.Error("a stranger's connection is open")
		}
	}
	if n := len(crowdOf(t, c, 2, 1, 2)); n != 2 {
		t.Errorf("%d connections are admitted at the end, expected 2", n)
	}
}
