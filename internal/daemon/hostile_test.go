package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/attest/snp"
	"keybroker/derive"
	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/config"
	"keybroker/internal/policy"
	"keybroker/seal"
	"keybroker/seal/passphrase"
)

// TestMain is also the programs that tests run beside themselves.
func TestMain(m *testing.M) {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	var err error
	switch mode {
	case "keyholder-serve":
		err = derive.ServeHolder(derive.HolderPageFD, derive.HolderSocketFD)
	case "bench-load":
		load(os.Args[2], os.Args[3])
	case "bench-floor":
		floor()
	case "bench-receive":
		err = receive(os.Args[2], os.Args[3], os.Args[4])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// openDir is a folder that any user may enter.
func openDir(t testing.TB) string {
	dir, err := os.MkdirTemp("", "keybroker-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startBroker runs a whole broker on a realm of its own, with a key for the service db. Each change is made before it serves.
func startBroker(t testing.TB, changes ...func(*Broker)) (broker *Broker, tcp, unixPath string) {
	paths, err := config.PathsUnder(openDir(t))
	if err != nil {
		t.Fatal(err)
	}
	master := derive.RandomMaster()
	makeRealm(t, paths.Realm, master)
	text := fmt.Sprintf("[[service]]\nname = \"db\"\nuid = [%d, %d]\n", loadUID, os.Getuid())
	if err := os.WriteFile(paths.PolicyFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	settings := config.Default()
	settings.Listen = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	settings.Libvirt = nil
	broker, l, err := open(Config{
		Settings: settings, Paths: paths, Policy: policy.Source{File: paths.PolicyFile, Required: true}, Version: "test",
		Log: slog.New(slog.DiscardHandler), Describe: func(seal.Slot) string { return "" },
		Roots: snp.AMDRoots(),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range changes {
		change(broker)
	}
	page := filledPage(t, master)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- broker.serve(ctx, l, passed{fdPage: {page}}, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		broker.close()
	})
	for _, err := broker.realm.current(); err != nil; _, err = broker.realm.current() {
		runtime.Gosched()
	}
	return broker, l.tcp[0].Addr().String(), paths.Socket
}

func makeRealm(t testing.TB, path string, master derive.Master) {
	octets, err := master.Octets()
	if err != nil {
		t.Fatal(err)
	}
	o, err := seal.Create(octets, func(m []byte) ([16]byte, error) {
		again, err := derive.NewMaster(m)
		if err != nil {
			return [16]byte{}, err
		}
		s, err := derive.NewSchedule(again)
		if err != nil {
			return [16]byte{}, err
		}
		return s.RealmID(), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(context.Context) ([]byte, error) { return []byte("a passphrase of the tests"), nil }
	p, err := passphrase.New(passphrase.Config{Ask: ask, AskNew: ask, Time: 1, MemoryKiB: 8 << 10, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.AddSlot(context.Background(), passphrase.Kind, p); err != nil {
		t.Fatal(err)
	}
	lock, err := seal.Lock(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := lock.Create(o, nil); err != nil {
		t.Fatal(err)
	}
}

// raw is a connection that says whatever a test wants.
type raw struct {
	net.Conn
	in *bufio.Reader
}

func dialRaw(t testing.TB, path string) *raw {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return newRaw(c)
}

func newRaw(c net.Conn) *raw {
	c.SetDeadline(time.Now().Add(time.Minute)) // a test that hangs says where
	return &raw{c, bufio.NewReader(c)}
}

// ask sends octets, which may be refused half way, and returns the answer's status and refusal code.
func (r *raw) ask(octets string) (status int, code inject.Code, err error) {
	written := make(chan struct{})
	go func() {
		defer close(written)
		io.WriteString(r, octets)
	}()
	method, _, _ := strings.Cut(octets, " ")
	response, err := http.ReadResponse(r.in, &http.Request{Method: method})
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, inject.MaxBody))
	if err == nil && !response.Close {
		<-written
	}
	var refused inject.Refusal
	json.Unmarshal(body, &refused) // an answer of net/http itself has no code
	return response.StatusCode, refused.Code, err
}

// closed waits for the other side to close, whatever it says before.
func (r *raw) closed() bool {
	_, err := io.Copy(io.Discard, r.in)
	return err == nil || errors.Is(err, syscall.ECONNRESET)
}

func getting(path string, headers ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: localhost\r\n" + strings.Join(append(headers, "\r\n"), "\r\n")
}

func posting(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

const ours = "Keybroker: 1"

// Whatever comes in at a local door gets a clear and bounded answer, and the next who asks rightly is served.
func TestHostileRequests(t *testing.T) {
	broker, _, _ := startBroker(t)
	p, big := broker.paths, strings.Repeat("x", 70<<10)
	for _, c := range []struct {
		name, door, octets string
		status             int
		code               inject.Code
	}{
		{"garbage", p.Socket, "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, ""},
		{"no version", p.Socket, "GET /v1/keys/db\r\n\r\n", 400, ""},
		{"another protocol", p.Socket, "SSH-2.0-x\r\n\r\n", 400, ""},
		{"no host", p.Socket, "GET /v1/keys/db HTTP/1.1\r\n\r\n", 400, ""},
		{"two hosts", p.Socket, getting("/v1/keys/db", ours, "Host: x"), 400, ""},
		{"two lengths", p.Socket, getting("/v1/keys/db", ours, "Content-Length: 1", "Content-Length: 2"), 400, ""},
		{"unknown coding", p.Socket, getting("/v1/keys/db", ours, "Transfer-Encoding: x"), 400, ""},
		{"long header", p.Socket, getting("/v1/keys/db", ours, "X: "+big), 431, ""},
		{"many headers", p.Socket, getting("/v1/keys/db", ours, strings.Repeat("X: y\r\n", 10<<10)+"X: y"), 431, ""},
		{"long path", p.Socket, getting("/v1/keys/" + big), 431, ""},
		{"body", p.Socket, getting("/v1/keys/db", ours, "Content-Length: 1") + "x", 400, inject.CodeMalformed},
		{"large body", p.Socket, getting("/v1/keys/db", ours, fmt.Sprint("Content-Length: ", len(big))) + big, 400, inject.CodeMalformed},
		{"body without end", p.Socket, getting("/v1/keys/db", ours, "Transfer-Encoding: chunked") + "ffffffff\r\n" + big, 400, inject.CodeMalformed},
		{"other method", p.Socket, posting("/v1/keys/db", ""), 405, ""},
		{"only the head", p.Socket, strings.Replace(getting("/v1/keys/db", ours), "GET", "HEAD", 1), 405, ""},
		{"no name", p.Socket, getting("/v1/keys/", ours), 404, ""},
		{"name with a slash", p.Socket, getting("/v1/keys/a/db", ours), 404, ""},
		{"hidden slash", p.Socket, getting("/v1/keys/a%2fdb", ours), 404, ""},
		{"upper case", p.Socket, getting("/v1/keys/DB", ours), 403, policy.CodeBadName},
		{"dots", p.Socket, getting("/v1/keys/%2e%2e", ours), 403, policy.CodeBadName},
		{"bad UTF-8", p.Socket, getting("/v1/keys/%ff%00", ours), 403, policy.CodeBadName},
		{"bad query", p.Socket, getting("/v1/keys/db?epoch=x", ours), 400, inject.CodeMalformed},
		{"a route of another door", p.Socket, getting("/v1/status"), 404, ""},
		{"garbage to the hook's socket", p.HookSocket, "\x00\x00\r\n\r\n", 400, ""},
		{"long header to the hook's socket", p.HookSocket, getting("/v1/hook", "X: "+big), 431, ""},
		{"large event", p.HookSocket, posting("/v1/hook", big), 400, ""},
		{"empty event", p.HookSocket, posting("/v1/hook", ""), 400, ""},
		{"unknown field", p.HookSocket, posting("/v1/hook", `{"operation":"started","more":1}`), 400, ""},
		{"repeated field", p.HookSocket, posting("/v1/hook", `{"operation":"started","operation":"started"}`), 400, ""},
		{"mis-cased field", p.HookSocket, posting("/v1/hook", `{"Operation":"started"}`), 400, ""},
		{"wrong type", p.HookSocket, posting("/v1/hook", `{"operation":1}`), 400, ""},
		{"bad UTF-8 in an event", p.HookSocket, posting("/v1/hook", "{\"operation\":\"\xff\"}"), 400, ""},
		{"garbage to the admin socket", p.AdminSocket, "\x00\x00\r\n\r\n", 400, ""},
		{"long header to the admin socket", p.AdminSocket, getting("/v1/status", "X: "+big), 431, ""},
		{"large body to the admin socket", p.AdminSocket, posting("/v1/vm/x/allow", big), 403, inject.CodeUnknownPeer},
		{"wrong method to the admin socket", p.AdminSocket, posting("/v1/status", ""), 405, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, code, err := dialRaw(t, c.door).ask(c.octets)
			if status != c.status || code != c.code || err != nil {
				t.Errorf("status %d, code %q, %v; expected %d, %q", status, code, err, c.status, c.code)
			}
		})
	}
	good := dialRaw(t, p.Socket)
	for range 2 {
		if status, code, err := good.ask(getting("/v1/keys/db", ours)); status != http.StatusOK {
			t.Errorf("a good request afterwards: %d, %q, %v", status, code, err)
		}
	}
}

// impatient makes a broker wait less than it should for a slow caller.
func impatient(b *Broker) {
	b.cfg.Limits.HeaderTimeout, b.services.patience = 200*time.Millisecond, 200*time.Millisecond
}

// A caller that is slow, says nothing or does not read is gone after a while, and leaves nothing behind.
func TestSlowCallers(t *testing.T) {
	broker, _, path := startBroker(t, impatient)
	before := runtime.NumGoroutine()
	drip := func(r *raw, octets string) {
		for n := range len(octets) {
			if _, err := io.WriteString(r, octets[n:n+1]); err != nil {
				return
			}
			<-time.After(20 * time.Millisecond) // it is slow
		}
	}
	long := getting("/v1/keys/db", ours, "X: "+strings.Repeat("x", 4<<10))
	t.Run("callers", func(t *testing.T) {
		for name, behave := range map[string]func(*raw){
			"says nothing":          func(*raw) {},
			"half a line":           func(r *raw) { io.WriteString(r, long[:10]) },
			"header octet by octet": func(r *raw) { drip(r, long) },
			"body octet by octet": func(r *raw) {
				if status, _, err := r.ask(getting("/v1/keys/db", ours, "Content-Length: 10000")); status != http.StatusBadRequest {
					t.Errorf("status %d, %v", status, err)
				}
				drip(r, strings.Repeat("x", 10000))
			},
			"second request octet by octet": func(r *raw) {
				if status, _, err := r.ask(getting("/v1/keys/db", ours)); status != http.StatusOK {
					t.Errorf("status %d, %v", status, err)
				}
				drip(r, long)
			},
			"does not read": func(r *raw) {
				for err := error(nil); err == nil; { // until the broker has closed
					_, err = io.WriteString(r, getting("/v1/keys/db", ours))
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				r := dialRaw(t, path)
				start := time.Now()
				behave(r)
				if took := time.Since(start); !r.closed() || took > 20*time.Second {
					t.Errorf("not closed after %v", took)
				}
			})
		}
	})
	t.Run("admin socket", func(t *testing.T) {
		r, start := dialRaw(t, broker.paths.AdminSocket), time.Now()
		for err := error(nil); err == nil; { // until the broker has closed
			_, err = io.WriteString(r, getting("/v1/status"))
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("who does not read was closed after %v", took)
		}
	})
	backToNormal(t, broker, before)
}

// backToNormal waits until the broker has let go of all connections, and of what they needed.
func backToNormal(t *testing.T, b *Broker, goroutines int) {
	t.Helper()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-poll.C {
		open, refusing, users := b.services.conns.counts()
		now := runtime.NumGoroutine()
		if open+refusing+users == 0 && now <= goroutines+2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %d connections of %d users, %d that are refused, %d goroutines (%d before)", open, users, refusing, now, goroutines)
		}
	}
}

func (s *conns) counts() (open, refusing, users int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open), len(s.refusing), len(s.byUID)
}

// One user who opens over a thousand connections has those that it may, is told so on others, and does not disturb a client
// that is there already.
func TestThousandConnections(t *testing.T) {
	const allowed = 100
	broker, _, path := startBroker(t, func(b *Broker) {
		b.cfg.Limits.ConnectionsPerCaller, b.cfg.Limits.HeaderTimeout = allowed+1, time.Minute // the flood may be slow
	})
	before, heap := runtime.NumGoroutine(), memory()
	good := dialRaw(t, path)
	const requests = 5000
	alone := latency(t, good, func(n int) bool { return n < requests })

	f := newFlood(path, allowed+maxRefusing+100)
	flooded := latency(t, good, func(n int) bool {
		select {
		case <-f.done:
			return n < requests
		default:
			return true
		}
	})
	f.close()
	t.Logf("%v; the good client's p99 %v, alone %v: %.1f times", f, flooded, alone, float64(flooded)/float64(alone))
	if f.served.Load() != allowed || f.busy.Load() < maxRefusing || f.undialled.Load() != 0 {
		t.Errorf("%v; expected %d and at least %d", f, allowed, maxRefusing)
	}
	if flooded > max(10*alone, 100*time.Millisecond) { // hardly twice where nothing else runs
		t.Errorf("a good client's p99 is %v, alone it was %v", flooded, alone)
	}
	good.Close()
	backToNormal(t, broker, before)
	if now := memory(); now > heap+8<<20 {
		t.Errorf("%d KiB of memory in use, before %d KiB", now>>10, heap>>10)
	}
}

// flood is many connections at once, each with one request.
type flood struct {
	conns                           []*raw
	served, busy, closed, undialled atomic.Int64
	done                            chan struct{} // all have their answer
}

func newFlood(path string, connections int) *flood {
	f := &flood{done: make(chan struct{})}
	go func() {
		defer close(f.done)
		for range connections {
			c, err := net.Dial("unix", path)
			if err != nil {
				f.undialled.Add(1)
				continue
			}
			f.conns = append(f.conns, newRaw(c))
		}
		var parts sync.WaitGroup
		for _, c := range f.conns {
			parts.Go(func() { f.ask(c) })
		}
		parts.Wait()
	}()
	return f
}

func (f *flood) ask(c *raw) {
	switch status, code, _ := c.ask(getting("/v1/keys/db", ours)); {
	case status == http.StatusOK:
		f.served.Add(1)
	case status == http.StatusTooManyRequests && code == inject.CodeBusy:
		f.busy.Add(1)
	default:
		f.closed.Add(1)
	}
}

func (f *flood) String() string {
	return fmt.Sprintf("%d connections: %d served, %d told busy, %d closed", len(f.conns), f.served.Load(), f.busy.Load(), f.closed.Load())
}

func (f *flood) close() {
	for _, c := range f.conns {
		c.Close()
	}
}

// latency asks again and again while more says so, and returns the 99th percentile.
func latency(t testing.TB, r *raw, more func(n int) bool) time.Duration {
	t.Helper()
	var all []time.Duration
	for n := 0; more(n); n++ {
		r.SetDeadline(time.Now().Add(time.Minute))
		start := time.Now()
		if status, code, err := r.ask(getting("/v1/keys/db", ours)); status != http.StatusOK {
			t.Fatalf("request %d: %d, %q, %v", n+1, status, code, err)
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return all[len(all)*99/100]
}

// guestDoor has a broker dial one guest, and returns where the guest's ends of its connections come.
func guestDoor(t *testing.T, b *Broker) <-chan *raw {
	ends := make(chan *raw)
	b.dial = func(ctx context.Context, _, _ uint32) (net.Conn, error) {
		conn, f := socketPair(t)
		theirs, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		select {
		case ends <- newRaw(theirs):
			return conn, nil
		case <-ctx.Done():
			theirs.Close()
			conn.Close()
			return nil, ctx.Err()
		}
	}
	p, err := hypervisor.OpenProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b.ticket(testVM, "prepare", (*hypervisor.Ticket).Prepare)
	b.ticket(testVM, "start", func(t *hypervisor.Ticket) bool {
		return t.Started(p.Boot(testVM), hypervisor.OriginCold, hypervisor.GapRefuse)
	})
	x := b.guests.begin(b.running, hypervisor.Domain{UUID: testVM, Name: "web1", CID: 7, Tier: inject.TierVM, Metadata: true, Running: true, PID: p.PID}, p)
	t.Cleanup(func() { b.guests.end(testVM, x) })
	return ends
}

// A guest gets as clear an answer as anybody, and a bad one does not keep the broker from dialling again.
func TestHostileGuest(t *testing.T) {
	broker, _, _ := startBroker(t)
	ends, big := guestDoor(t, broker), strings.Repeat(" ", inject.MaxBody+1)
	for _, c := range []struct {
		name, octets string
		status       int
		code         inject.Code
	}{
		{"garbage", "\x00\x00\r\n\r\n", 400, ""},
		{"long header", getting("/v1/events", "X: "+big), 431, ""},
		{"large body", posting("/v1/release", big), 413, inject.CodeTooLarge},
		{"unknown field", posting("/v1/challenge", `{"tier":"vm","subject":"","more":1}`), 400, inject.CodeMalformed},
		{"a nonce that was never given", posting("/v1/release", `{"nonce":"AAAA"}`), 400, inject.CodeWrongIssuer},
		{"a route of another door", getting("/v1/keys/db", ours), 404, ""},
		{"a good challenge", posting("/v1/challenge", `{"tier":"vm","subject":""}`), 200, ""},
	} {
		r := <-ends
		status, code, err := r.ask(c.octets)
		if status != c.status || code != c.code || err != nil {
			t.Errorf("%s: status %d, code %q, %v; expected %d, %q", c.name, status, code, err, c.status, c.code)
		}
		r.Close()
	}
}

// A guest that is slow, says nothing or does not read has its time, and then no connection.
func TestSlowGuests(t *testing.T) {
	issuer := newBenchIssuer(t)
	drip := func(c net.Conn, octets string) {
		go io.Copy(io.Discard, c)
		second := time.NewTicker(time.Second)
		defer second.Stop()
		for n := range len(octets) {
			if _, err := io.WriteString(c, octets[n:n+1]); err != nil {
				return
			}
			<-second.C
		}
	}
	long := posting("/v1/challenge", strings.Repeat(" ", 10000))
	for name, behave := range map[string]func(net.Conn){
		"says nothing":          func(net.Conn) {},
		"header octet by octet": func(c net.Conn) { drip(c, long) },
		"body octet by octet": func(c net.Conn) {
			io.WriteString(c, long[:100])
			drip(c, long[100:])
		},
		"does not read": func(c net.Conn) { io.WriteString(c, posting("/v1/challenge", `{"tier":"vm","subject":""}`)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				theirs, conn := net.Pipe()
				start := time.Now()
				var guest sync.WaitGroup
				guest.Go(func() { behave(theirs) })
				if err := issuer.Serve(t.Context(), conn, issuer.door()); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took > time.Minute {
					t.Errorf("closed after %v", took)
				}
				theirs.Close()
				guest.Wait()
			})
		})
	}
}
