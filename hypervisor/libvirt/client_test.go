package libvirt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"

	"keybroker/hypervisor"
)

// impatient is how long tests wait for a libvirt that will not answer; patient is more than a busy machine needs for one that does.
const (
	impatient = 50 * time.Millisecond
	patient   = 20 * time.Second
)

func (d fakeDomain) want(cid uint32) hypervisor.Domain {
	return hypervisor.Domain{UUID: d.uuid, Name: d.name, CID: cid, Offered: []string{"disk"}, Metadata: true, Running: true}
}

func TestLive(t *testing.T) {
	web1, web2 := domain(1, 42), domain(2, 43)
	c := newServer(t, web1, web2).client(Config{})
	for range 3 { // the second and third on a connection of the pool
		got, err := c.Live(t.Context(), web1.uuid)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(web1.want(42), got); diff != "" {
			t.Fatal(diff)
		}
	}
}

// A domain that is off is found by its UUID and its name.
func TestDefined(t *testing.T) {
	off := domain(2, 43)
	off.state = golibvirt.DomainShutoff
	want := off.want(43)
	want.Running = false
	c := newServer(t, domain(1, 42), off).client(Config{})
	for _, of := range []string{off.name, off.uuid} {
		got, err := c.Defined(t.Context(), of)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v %s", of, err, diff)
		}
	}
	for _, of := range []string{"web3", "99999999-0000-4000-8000-000000000001", ""} {
		if d, err := c.Defined(t.Context(), of); !errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %+v, %v", of, d, err)
		}
	}
}

func TestLiveRefuses(t *testing.T) {
	const unknown = "99999999-0000-4000-8000-000000000001"
	self := domain(1, 42)
	with := func(f func(*fakeDomain)) fakeDomain { d := self; f(&d); return d }
	replace := func(old, other string) fakeDomain {
		return with(func(d *fakeDomain) { d.xml = strings.Replace(d.xml, old, other, 1) })
	}
	cases := map[string]struct {
		uuid    string
		domains []fakeDomain
		want    error // nil: any
	}{
		"unknown":                {unknown, []fakeDomain{self}, ErrNotFound},
		"not a UUID":             {"web1", []fakeDomain{self}, nil},
		"off":                    {self.uuid, []fakeDomain{with(func(d *fakeDomain) { d.state = golibvirt.DomainShutoff })}, ErrNotRunning},
		"paused":                 {self.uuid, []fakeDomain{with(func(d *fakeDomain) { d.state = golibvirt.DomainPaused })}, ErrNotRunning},
		"crashed":                {self.uuid, []fakeDomain{with(func(d *fakeDomain) { d.state = golibvirt.DomainCrashed })}, ErrNotRunning},
		"address of another too": {self.uuid, []fakeDomain{self, domain(2, 42)}, ErrAddressTaken},
		"two CIDs":               {self.uuid, []fakeDomain{replace("</vsock>", "<cid address='9'/></vsock>")}, nil},
		"metadata that is wrong": {self.uuid, []fakeDomain{replace(`name="disk"`, `name="DISK"`)}, nil},
		"another's definition":   {self.uuid, []fakeDomain{replace("<uuid>0", "<uuid>1")}, nil},
	}
	for title, x := range cases {
		t.Run(title, func(t *testing.T) {
			got, err := newServer(t, x.domains...).client(Config{}).Live(t.Context(), x.uuid)
			if err == nil || x.want != nil && !errors.Is(err, x.want) {
				t.Errorf("error %v, want %v", err, x.want)
			}
			if diff := cmp.Diff(hypervisor.Domain{}, got); diff != "" {
				t.Errorf("an error and a domain: %s", diff)
			}
		})
	}
}

// A domain whose definition cannot be read, or which libvirt itself cannot show, harms nobody but itself.
func TestBadDomainHarmsOnlyItself(t *testing.T) {
	web1, unreadable, unshown := domain(1, 42), domain(2, 43), domain(3, 44)
	unreadable.xml = "<domain"
	s := newServer(t, web1, unreadable, unshown)
	s.answer = func(n *session, c request) bool {
		if c.proc != procXML || !containsUUID(c.args, unshown.uuid) {
			return false
		}
		n.refuse(c, uint32(golibvirt.ErrInternalError), "internal error")
		return true
	}
	c := s.client(Config{})
	if d, err := c.Live(t.Context(), web1.uuid); err != nil || d.CID != 42 {
		t.Errorf("CID %d, %v", d.CID, err)
	}
	all, err := c.List(t.Context())
	if err != nil || len(all) != 3 {
		t.Fatalf("%d domains, %v", len(all), err)
	}
	for i, bad := range []fakeDomain{unreadable, unshown} {
		if d, err := c.Live(t.Context(), bad.uuid); err == nil {
			t.Errorf("%s is %+v", bad.name, d)
		}
		if d := all[i+1]; d.UUID != bad.uuid || d.Name != bad.name || !d.Running || d.Problem == "" || d.CID != 0 {
			t.Errorf("%s is listed as %+v", bad.name, d)
		}
	}
}

// What others had is not held against a domain that has the address now; what they have is.
func TestLiveAsksAgainBeforeItAccuses(t *testing.T) {
	web1, web2 := domain(1, 42), domain(2, 43)
	s := newServer(t, web1, web2)
	c := s.client(Config{})
	if _, err := c.Live(t.Context(), web1.uuid); err != nil { // learns that web2 has 43
		t.Fatal(err)
	}
	s.set(func() { s.domains[0], s.domains[1] = domain(1, 43), domain(2, 0) }) // unplugged there, plugged here
	if d, err := c.Live(t.Context(), web1.uuid); err != nil || d.CID != 43 {
		t.Errorf("CID %d, %v", d.CID, err)
	}
	s.set(func() { s.domains[1] = domain(2, 43); s.domains[1].id++ }) // started anew
	if _, err := c.Live(t.Context(), web1.uuid); !errors.Is(err, ErrAddressTaken) {
		t.Errorf("two with one address: %v", err)
	}
}

// The work for one look-up does not grow with the definitions of all others.
func TestLiveReadsOthersOnce(t *testing.T) {
	var domains []fakeDomain
	for i := range 50 {
		domains = append(domains, domain(i+1, uint32(i+10)))
	}
	s := newServer(t, domains...)
	c := s.client(Config{})
	for range 10 {
		if _, err := c.Live(t.Context(), domains[0].uuid); err != nil {
			t.Fatal(err)
		}
	}
	definitions := 0
	s.set(func() {
		for _, p := range s.calls {
			if p == procXML {
				definitions++
			}
		}
	})
	if definitions != 10+49 {
		t.Errorf("%d definitions read", definitions)
	}
}

func TestLiveProcess(t *testing.T) {
	web1 := domain(1, 42)
	c := newServer(t, web1).client(Config{RunDir: t.TempDir()})
	if err := os.WriteFile(c.PIDFile("web1"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := c.Live(t.Context(), web1.uuid)
	if err != nil || d.PID != 0 || d.StartTime != 0 {
		t.Errorf("process %d, %v: a pid file that names another's process", d.PID, err)
	}
}

func TestList(t *testing.T) {
	web1, web2, off, bad := domain(1, 42), domain(2, 0), domain(3, 44), domain(4, 45)
	web2.state = golibvirt.DomainPaused
	off.state = golibvirt.DomainShutoff
	bad.xml = strings.Replace(bad.xml, `name="disk"`, `name="DISK"`, 1)
	got, err := newServer(t, web1, web2, off, bad).client(Config{}).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	paused := web2.want(0)
	paused.Paused = true
	want := []hypervisor.Domain{web1.want(42), paused, {UUID: bad.uuid, Name: bad.name, Running: true}}
	if len(got) == 3 && got[2].Problem != "" {
		got[2].Problem = ""
	} else {
		t.Error("no problem told of the one that cannot be read")
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSockets(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	stale := filepath.Join(t.TempDir(), "stale") // a socket that nobody listens on any more
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: stale}); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	if _, err := s.client(Config{Sockets: []string{missing, stale, s.path}}).Live(t.Context(), web1.uuid); err != nil {
		t.Error(err)
	}
	_, err = s.client(Config{Sockets: []string{missing, stale}}).Live(t.Context(), web1.uuid)
	if err == nil || !strings.Contains(err.Error(), missing) || !strings.Contains(err.Error(), "libvirtd") {
		t.Errorf("nobody there: %v", err)
	}
	if _, err = s.client(Config{Sockets: []string{}}).Live(t.Context(), web1.uuid); err == nil || !strings.HasSuffix(err.Error(), ": connecting to libvirt: no socket is configured") {
		t.Errorf("no socket: %v", err)
	}
}

func TestAuthentication(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	s.answer = func(n *session, c request) bool {
		switch c.proc {
		case procAuthList:
			n.reply(c, words(1, 2)) // polkit
		case 70: // AUTH_POLKIT
			n.reply(c, words(1))
		default:
			return false
		}
		return true
	}
	if _, err := s.client(Config{}).Live(t.Context(), web1.uuid); err != nil {
		t.Errorf("with polkit: %v", err)
	}
	s.set(func() {
		s.answer = func(n *session, c request) bool {
			if c.proc != procAuthList {
				return false
			}
			n.refuse(c, uint32(golibvirt.ErrAuthUnavailable), "no polkit agent available")
			return true
		}
	})
	_, err := s.client(Config{}).Live(t.Context(), web1.uuid)
	if err == nil || !strings.Contains(err.Error(), "auth_unix_ro") {
		t.Errorf("without: %v", err)
	}
}

// hang lets calls of one procedure go unanswered.
func hang(proc uint32) func(*session, request) bool {
	return func(_ *session, c request) bool { return c.proc == proc }
}

// stop answers nothing any more from the first call of one procedure on, as a process that was sent SIGSTOP.
func stop(proc uint32) func(*session, request) bool {
	var stopped atomic.Bool
	return func(_ *session, c request) bool {
		if c.proc == proc {
			stopped.Store(true)
		}
		return stopped.Load()
	}
}

// A libvirt that stops at any point costs its caller little, and works again when it does.
func TestHungLibvirt(t *testing.T) {
	web1, web2 := domain(1, 42), domain(2, 43)
	for _, proc := range []uint32{procAuthList, procOpen, procLookup, procState, procXML, procListAll} {
		s := newServer(t, web1, web2)
		s.answer = stop(proc)
		c := s.client(Config{Timeout: impatient, Patience: time.Hour})
		begin := time.Now()
		_, err := c.Live(t.Context(), web1.uuid)
		if !errors.Is(err, ErrNotAnswering) {
			t.Errorf("procedure %d: %v", proc, err)
		}
		if took := time.Since(begin); took > patient {
			t.Errorf("procedure %d: took %v", proc, took)
		}
		s.set(func() { s.answer = nil })
		c.cfg.Timeout = patient
		if _, err := c.Live(t.Context(), web1.uuid); err != nil {
			t.Errorf("procedure %d, answering again: %v", proc, err)
		}
	}
}

// A libvirt that is busy with another domain's start is waited for, but not for ever.
func TestBusyLibvirt(t *testing.T) {
	web1, web2 := domain(1, 42), domain(2, 43)
	for _, proc := range []uint32{procLookup, procState, procXML, procListAll} {
		t.Run(fmt.Sprint("procedure ", proc), func(t *testing.T) {
			t.Parallel()
			s := newServer(t, web1, web2)
			free := make(chan struct{})
			s.answer = func(_ *session, c request) bool {
				if c.proc == proc {
					<-free
				}
				return false
			}
			go func() { s.awaitCalls(procLibVersion, 1); close(free) }()
			if _, err := s.client(Config{Timeout: 2 * time.Second, Patience: patient}).Live(t.Context(), web1.uuid); err != nil {
				t.Error(err)
			}
			s.set(func() { s.answer = hang(proc) })
			if _, err := s.client(Config{Timeout: impatient, Patience: 4 * impatient}).Live(t.Context(), web1.uuid); !errors.Is(err, ErrNotAnswering) {
				t.Errorf("for ever: %v", err)
			}
		})
	}
}

// Many who ask a hung libvirt wait side by side.
func TestHungLibvirtHoldsNobodyElse(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	s.answer = stop(procLookup)
	c := s.client(Config{Timeout: 200 * time.Millisecond, Patience: 500 * time.Millisecond})
	begin := time.Now()
	var wait sync.WaitGroup
	for range 100 {
		wait.Go(func() {
			if _, err := c.Live(t.Context(), web1.uuid); !errors.Is(err, ErrNotAnswering) {
				t.Errorf("%v", err)
			}
		})
	}
	wait.Wait()
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("a hundred took %v", took)
	}
}

func TestLiveEndsWithItsContext(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	s.answer = hang(procLookup)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { s.awaitCalls(procLookup, 1); cancel() }()
	if _, err := s.client(Config{Timeout: time.Hour, Patience: time.Hour}).Live(ctx, web1.uuid); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Whatever a libvirt sends that is none, at any point, is an error in time, and the next call finds a new connection.
func TestGarbage(t *testing.T) {
	web1 := domain(1, 42)
	random := make([]byte, 4096)
	for i, g := 0, rand.New(rand.NewPCG(3, 4)); i < len(random); i++ {
		random[i] = byte(g.Uint32())
	}
	whole := func(c request, body ...uint32) []byte {
		return append(words(headerLen+uint32(4*len(body)), programRemote, 1, c.proc, typeReply, c.serial, 0), words(body...)...)
	}
	garbage := map[string]func(c request) []byte{
		"random":                 func(request) []byte { return random },
		"a line of text":         func(request) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n" + strings.Repeat("x", 99)) },
		"length 0":               func(request) []byte { return words(0, 0, 0, 0, 0, 0, 0) },
		"length 27":              func(request) []byte { return words(27, programRemote, 1, 1, typeReply, 1, 0) },
		"length 4 GiB":           func(request) []byte { return words(0xffffffff, programRemote, 1, 1, typeReply, 1, 0) },
		"length 9 MiB":           func(request) []byte { return words(9<<20, programRemote, 1, 1, typeReply, 1, 0) },
		"another program":        func(c request) []byte { return words(headerLen, 0x20008088, 1, c.proc, typeReply, c.serial, 0) },
		"a call":                 func(c request) []byte { return words(headerLen, programRemote, 1, c.proc, 0, c.serial, 0) },
		"no result":              func(c request) []byte { return whole(c) },
		"half a result":          func(c request) []byte { return whole(c, 1) },
		"an endless array":       func(c request) []byte { return whole(c, 0xffffffff, 0, 0, 0, 0, 0) },
		"a huge string":          func(c request) []byte { return whole(c, 0x7fffffff, 0x7fffffff, 0x7fffffff) },
		"an error without words": func(c request) []byte { return words(headerLen, programRemote, 1, c.proc, typeReply, c.serial, 1) },
		"the reply twice":        func(c request) []byte { return bytes.Repeat(whole(c, 1, 0, 0), 3) },
	}
	for title, send := range garbage {
		for _, proc := range []uint32{procAuthList, procLookup, procState, procXML} {
			s := newServer(t, web1)
			s.answer = func(n *session, c request) bool {
				if c.proc == proc {
					n.raw(send(c))
				}
				return c.proc == proc
			}
			c := s.client(Config{Timeout: patient, Patience: patient})
			if d, err := c.Live(t.Context(), web1.uuid); err == nil {
				t.Errorf("%s to procedure %d: taken for %+v", title, proc, d)
			} else if errors.Is(err, ErrNotAnswering) { // it was noticed, not waited for
				t.Errorf("%s to procedure %d: %v", title, proc, err)
			}
			s.set(func() { s.answer = nil })
			if _, err := c.Live(t.Context(), web1.uuid); err != nil {
				t.Errorf("%s to procedure %d, then sense: %v", title, proc, err)
			}
		}
	}
}

// A libvirt that was restarted costs its callers nothing.
func TestRestartedLibvirt(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	c := s.client(Config{Timeout: patient})
	for range 20 {
		if _, err := c.Live(t.Context(), web1.uuid); err != nil {
			t.Fatal(err)
		}
		s.hangUp()
	}
}

// awaitGoroutines waits until no more than most goroutines are left, or the test's patience ends.
func awaitGoroutines(t *testing.T, most int) {
	t.Helper()
	for end := time.Now().Add(patient); runtime.NumGoroutine() > most; runtime.Gosched() {
		if time.Now().After(end) {
			var b [1 << 16]byte
			t.Fatalf("%d goroutines, want %d:\n%s", runtime.NumGoroutine(), most, b[:runtime.Stack(b[:], true)])
		}
	}
}

// A domain that was started anew while it was looked up is not the one that was looked up.
func TestLiveNoticesARestart(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	s.answer = func(_ *session, c request) bool {
		if c.proc == procListAll {
			s.set(func() { s.domains[0].id++ })
		}
		return false
	}
	if _, err := s.client(Config{}).Live(t.Context(), web1.uuid); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
}

// Nothing is kept of domains that have ended.
func TestLiveForgets(t *testing.T) {
	web1 := domain(1, 42)
	s := newServer(t, web1)
	c := s.client(Config{})
	for i := range 20 {
		s.set(func() { s.domains = []fakeDomain{web1, domain(i+2, uint32(i+100)), domain(i+50, uint32(i+200))} })
		if _, err := c.Live(t.Context(), web1.uuid); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(c.addresses); n > 4 {
		t.Errorf("%d addresses kept", n)
	}
}

// FuzzWire: of whatever comes, what is passed on are whole sound packets from its beginning, and then one error for ever.
func FuzzWire(f *testing.F) {
	f.Add(words(headerLen+4, programRemote, 1, procAuthList, typeReply, 1, 0, 0))
	f.Add(append(words(headerLen+4, programKeepalive, 1, 1, typeMessage, 0, 0, 7), words(headerLen, programRemote, 1, procOpen, typeReply, 1, 0)...))
	f.Add(append(words(headerLen+32, programRemote, 1, procListAll, typeReply, 1, 0, 1, 0, 1, 2, 3, 4, 5, 1), words(headerLen+16, programRemote, 1, procXML, typeReply, 2, 1, 42, 10, 1, 0)...))
	f.Add(words(0x30303030, programRemote, 1, procAuthList, typeReply, 1, 0, 0))
	f.Add(append(words(headerLen, 7, 1, procOpen, typeReply, 1, 0), words(headerLen+4, programRemote, 1, procAuthList, typeReply, 1, 0, 0)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		here, there := net.Pipe()
		go func() { _, _ = there.Write(data); there.Close() }()
		w := newWire(here)
		close(w.opened)
		var passed []byte
		for {
			p := make([]byte, 1+len(passed)%50)
			n, err := w.Read(p)
			passed = append(passed, p[:n]...)
			if err != nil {
				break
			}
		}
		if _, err := w.Read(make([]byte, 1)); err == nil || err != w.cause() {
			t.Fatalf("after the end: %v, %v", err, w.cause())
		}
		if !bytes.HasPrefix(data, passed) {
			t.Fatal("passed on what did not come")
		}
		for serial := int32(0); len(passed) > 0; {
			n := int(passed[0])<<24 | int(passed[1])<<16 | int(passed[2])<<8 | int(passed[3])
			if n < headerLen || n > len(passed) {
				t.Fatalf("a packet of %d octets is passed on, %d have come", n, len(passed))
			}
			if now := int32(binary.BigEndian.Uint32(passed[20:])); passed[19] == typeReply {
				if now <= serial {
					t.Fatalf("reply %d after %d", now, serial)
				}
				serial = now
			}
			passed = passed[n:]
		}
	})
}
