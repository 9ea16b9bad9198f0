package daemon

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/tuple"
)

const (
	loadConns  = 64
	loadTime   = time.Second
	loadRounds = 7 // each of both sides in turns; the median round counts
	loadUID    = 1001

	sessions      = 256 // at once in one run of the tier 3 measurement
	moreReleases  = 4   // after the first in a session that asks again
	releaseRounds = 7
	fewGuests     = 100
	manyGuests    = 1000
)

var table = flag.Bool("table", false, "measure, and print the table of `make bench`")

// TestTable is `make bench`: it measures everything and prints one table. Each ratio is between two figures of the same run;
// docs/performance.md says how to read them.
func TestTable(t *testing.T) {
	if !*table {
		t.Skip("this measures for two minutes: `make bench` does it")
	}
	fmt.Printf("%-46s %12s %12s %7s  %s\n", "WHAT", "KEYBROKER", "AGAINST", "RATIO", "AIM")
	t.Run("service", benchService)
	t.Run("derive", benchDerive)
	t.Run("release", benchRelease)
	t.Run("guests", benchGuests)
	t.Run("agent", benchAgent)
}

// row prints one line of the table. A zero ratio has no peer to compare with.
func row(what, ours, peer string, ratio float64, aim string) {
	shown := ""
	if ratio != 0 {
		shown = fmt.Sprintf("%.2f", ratio)
	}
	fmt.Printf("%-46s %12s %12s %7s  %s\n", what, ours, peer, shown, aim)
}

// median returns the element in the middle of the sorted list.
func median[T any](all []T, by func(T) float64) T {
	slices.SortFunc(all, func(a, b T) int { return cmp.Compare(by(a), by(b)) })
	return all[len(all)/2]
}

// loadResult is what the load's process prints.
type loadResult struct {
	Requests int
	Seconds  float64
	P50, P99 time.Duration
	Failed   int
	CPU      time.Duration // of load and servers
}

func (r loadResult) perSecond() float64 { return float64(r.Requests) / r.Seconds }

// cost is the CPU time of one request.
func (r loadResult) cost() time.Duration { return r.CPU / time.Duration(r.Requests) }

// load asks over loadConns connections, one request after the other on each, for loadTime.
func load(network, address string) {
	var mu sync.Mutex
	var all []time.Duration
	var parts sync.WaitGroup
	failed := 0
	start := time.Now()
	for range loadConns {
		parts.Go(func() {
			mine, bad := oneConnection(network, address, start.Add(loadTime))
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			failed += bad
		})
	}
	parts.Wait()
	slices.Sort(all)
	r := loadResult{Requests: len(all), Seconds: time.Since(start).Seconds(), Failed: failed}
	if len(all) > 0 {
		r.P50, r.P99 = all[len(all)/2], all[len(all)*99/100]
	}
	json.NewEncoder(os.Stdout).Encode(r)
}

// requestFor is a request as a service makes it.
func requestFor(network, address string) []byte {
	host := address
	if network == "unix" {
		host = "localhost"
	}
	return []byte("GET /v1/keys/db HTTP/1.1\r\nHost: " + host + "\r\nKeybroker: 1\r\n\r\n")
}

func oneConnection(network, address string, until time.Time) (times []time.Duration, failed int) {
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, 1
	}
	defer c.Close()
	in, request := bufio.NewReader(c), requestFor(network, address)
	for time.Now().Before(until) {
		began := time.Now()
		if _, err := c.Write(request); err != nil {
			return times, failed + 1
		}
		response, err := http.ReadResponse(in, nil)
		if err != nil {
			return times, failed + 1
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			failed++
			continue
		}
		times = append(times, time.Since(began))
	}
	return times, failed
}

// runLoad runs the load in a process of its own, as an ordinary user where this one is root: root is not served over TCP. The
// servers are processes whose CPU time counts.
func runLoad(b testing.TB, network, address string, servers ...int) (r loadResult) {
	b.Helper()
	before := cpuOf(b, servers)
	cmd := exec.Command("/proc/self/exe", "bench-load", network, address)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: loadUID, Gid: loadUID}}
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil || r.Failed > 0 || r.Requests == 0 {
		b.Fatalf("load on %s: %v, %+v", address, err, r)
	}
	r.CPU = cpuOf(b, servers) - before + cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return r
}

// cpuOf returns the CPU time of processes' threads, to the nanosecond. Threads do not end in these processes.
func cpuOf(b testing.TB, pids []int) (sum time.Duration) {
	for _, pid := range pids {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(threads) == 0 {
			b.Fatalf("process %d has no threads (%v): the kernel needs CONFIG_SCHED_INFO", pid, err)
		}
		for _, file := range threads {
			var ns time.Duration
			text, err := os.ReadFile(file)
			if _, scanErr := fmt.Sscan(string(text), &ns); err == nil && scanErr == nil {
				sum += ns
			}
		}
	}
	return sum
}

// round is the load on both sides, one right after the other.
type round struct{ ours, floor loadResult }

func (r round) ratio() float64     { return r.ours.perSecond() / r.floor.perSecond() }
func (r round) costRatio() float64 { return float64(r.floor.cost()) / float64(r.ours.cost()) }

// benchService compares tier 1 (policy, audit, keyholder and the kernel's word on the caller) with a bare net/http handler
// that computes the same HKDF in its own process. Both serve the same 64 keep-alive connections, in turns.
func benchService(b *testing.T) {
	broker, tcp, unixPath := startBroker(b)
	holder, err := broker.realm.current()
	if err != nil {
		b.Fatal(err)
	}
	floorTCP, floorUnix, floorPID := startFloor(b)
	for _, c := range []struct{ name, network, ours, floor string }{
		{"Unix socket", "unix", unixPath, floorUnix}, {"TCP", "tcp", tcp, floorTCP},
	} {
		var rounds []round
		for range loadRounds {
			floor := runLoad(b, c.network, c.floor, floorPID)
			rounds = append(rounds, round{runLoad(b, c.network, c.ours, os.Getpid(), holder.PID()), floor})
		}
		printService("tier 1, "+c.name, rounds)
	}
}

func printService(what string, rounds []round) {
	m := median(rounds, round.ratio)
	row(what+": requests/s", fmt.Sprintf("%.0f", m.ours.perSecond()), fmt.Sprintf("%.0f", m.floor.perSecond()), m.ratio(), ">= 0.7 of a bare net/http handler")
	row(what+": p50", micros(m.ours.P50), micros(m.floor.P50), float64(m.ours.P50)/float64(m.floor.P50), "")
	row(what+": p99", micros(m.ours.P99), micros(m.floor.P99), float64(m.ours.P99)/float64(m.floor.P99), "")
	m = median(rounds, round.costRatio)
	row(what+": CPU of a request, client's too", micros(m.ours.cost()), micros(m.floor.cost()), m.costRatio(), "as requests/s, other load aside")
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f us", float64(d)/1e3) }

// BenchmarkService is one door's load alone, for a profile of the broker.
func BenchmarkService(b *testing.B) {
	_, tcp, unixPath := startBroker(b)
	for network, address := range map[string]string{"unix": unixPath, "tcp": tcp} {
		b.Run(network, func(b *testing.B) {
			for range b.N {
				b.ReportMetric(runLoad(b, network, address).perSecond(), "req/s")
			}
		})
	}
}

// floor is the bare handler's process. It serves the listeners that it inherited until its standard input ends.
func floor() {
	secret := make([]byte, 32)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := hkdf.Key(sha256.New, secret, nil, strings.TrimPrefix(r.URL.Path, "/v1/keys/"), 32)
		if err != nil {
			panic(err)
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Write(key)
	})
	for n := range uintptr(2) {
		l, err := net.FileListener(os.NewFile(listenFDsStart+n, "listener"))
		if err != nil {
			panic(err)
		}
		go http.Serve(l, h)
	}
	io.Copy(io.Discard, os.Stdin)
}

func startFloor(b testing.TB) (tcp, unixPath string, pid int) {
	unixPath = filepath.Join(openDir(b), "floor.sock")
	t, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer t.Close()
	u, err := listenUnix(unixPath, 0o666)
	if err != nil {
		b.Fatal(err)
	}
	u.(*net.UnixListener).SetUnlinkOnClose(false)
	defer u.Close()
	var files []*os.File
	for _, l := range []interface{ File() (*os.File, error) }{t.(*net.TCPListener), u.(*net.UnixListener)} {
		f, err := l.File()
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	return t.Addr().String(), unixPath, startMode(b, files, "bench-floor")
}

// startMode runs this program as a child in one of TestMain's modes until the test ends.
func startMode(b testing.TB, files []*os.File, mode ...string) (pid int) {
	cmd := exec.Command("/proc/self/exe", mode...)
	cmd.ExtraFiles, cmd.Stderr = files, os.Stderr
	end, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		end.Close()
		if err := cmd.Wait(); err != nil {
			b.Errorf("%v: %v", mode, err)
		}
	})
	return cmd.Process.Pid
}

// benchDerive measures derivations a second, in this process and by a keyholder, by callers that wait for each answer.
func benchDerive(b *testing.T) {
	master := derive.RandomMaster()
	s, err := derive.NewSchedule(master)
	if err != nil {
		b.Fatal(err)
	}
	h := startHolder(b, master)
	for _, callers := range []int{1, 64} {
		software := perSecond(callers, func() error { _, err := s.ServiceKey("my-database", 1, 32); return err })
		holder := perSecond(callers, func() error { _, err := h.ServiceKey(b.Context(), 1, "my-database", 1, 32); return err })
		row(fmt.Sprintf("derivations/s by the keyholder, %d callers", callers), fmt.Sprintf("%.0f", holder), fmt.Sprintf("%.0f", software), holder/software, "against software in process")
	}
}

func startHolder(b testing.TB, master derive.Master) *derive.Holder {
	page, err := derive.NewPage()
	if err != nil {
		b.Fatal(err)
	}
	defer page.Close()
	if err := derive.FillPage(page, []derive.Master{master}); err != nil {
		b.Fatal(err)
	}
	h, err := derive.StartHolder(context.Background(), page, derive.HolderConfig{Command: []string{"/proc/self/exe", "keyholder-serve"}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.Close() })
	return h
}

// perSecond calls f from so many goroutines for a second.
func perSecond(callers int, f func() error) float64 {
	var parts sync.WaitGroup
	counts := make([]int, callers)
	start := time.Now()
	for n := range callers {
		parts.Go(func() {
			for time.Since(start) < time.Second {
				if err := f(); err != nil {
					panic(err)
				}
				counts[n]++
			}
		})
	}
	parts.Wait()
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / time.Since(start).Seconds()
}

// benchIssuer is the broker's side of a release without what the broker adds: policy, ticket, libvirt, audit and its fsync.
type benchIssuer struct {
	*inject.Issuer
	schedule *derive.Schedule
}

const benchSubject = "11111111-2222-3333-4444-555555555555"

func newBenchIssuer(b testing.TB) *benchIssuer {
	s, err := derive.NewSchedule(derive.RandomMaster())
	if err != nil {
		b.Fatal(err)
	}
	sign := func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
		return s.Sign(label, fields...)
	}
	return &benchIssuer{&inject.Issuer{Identity: s.Identity(), Sign: sign, Log: slog.New(slog.DiscardHandler)}, s}
}

func (i *benchIssuer) key() (derive.VMKey, error) {
	return i.schedule.VMKey(derive.VMKeyID{Tier: inject.TierVM, Subject: benchSubject, Name: "disk", Epoch: 1, Length: 32})
}

func (i *benchIssuer) door() inject.Door {
	return inject.Door{
		Tier:  inject.TierVM,
		Offer: func(context.Context, string) (string, []string, error) { return benchSubject, []string{"disk"}, nil },
		Decide: func(context.Context, *inject.Claim) (*inject.Grant, error) {
			k, err := i.key()
			return &inject.Grant{Keys: []inject.GrantedKey{{Name: "disk", Epoch: 1, Key: k}}}, err
		},
		Acked:   func(context.Context, *inject.Claim, []inject.Outcome) error { return nil },
		Refused: func(_ context.Context, _ *inject.Claim, r inject.Refusal) { fmt.Fprintln(os.Stderr, r) },
	}
}

// fetch is a guest's side: challenge and release, so many times, and one acknowledgement.
func fetch(r *inject.Receiver, conn net.Conn, times int) error {
	s, err := r.Session(conn)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var d *inject.Delivery
	for range times {
		c, err := s.Challenge(ctx)
		if err != nil {
			return err
		}
		if d, err = s.Release(ctx, c, []inject.Want{{Name: "disk"}}); err != nil {
			return err
		}
		d.Wipe()
	}
	return d.Ack(ctx, []inject.Outcome{{Name: "disk", Epoch: 1, Sink: "luks /dev/vdb", OK: true, Opened: true}})
}

// receive is the receiver's process: on each socket that it inherited it fetches its key so many times, and acknowledges it.
func receive(pin, times string) error {
	p, err := inject.ParsePin(pin)
	if err != nil {
		return err
	}
	key, err := inject.NewReceiverKey()
	if err != nil {
		return err
	}
	again, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	r := &inject.Receiver{Tier: inject.TierVM, Pins: []inject.Pin{p}, Key: key}
	var parts sync.WaitGroup
	var failed atomic.Pointer[error]
	for n := range uintptr(sessions) {
		parts.Go(func() {
			f := os.NewFile(listenFDsStart+n, "socket")
			defer f.Close()
			conn, err := net.FileConn(f)
			if err == nil {
				defer conn.Close()
				err = fetch(r, conn, again)
			}
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	parts.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// benchRelease compares the CPU time of the issuer's side of a release with that of the cryptographic operations in it. The
// receivers are another process.
func benchRelease(b *testing.T) {
	i := newBenchIssuer(b)
	type sample struct{ first, again, crypto time.Duration }
	var all []sample
	for range releaseRounds {
		first, many := serveReleases(b, i, 1), serveReleases(b, i, 1+moreReleases)
		all = append(all, sample{first, (many - first) / moreReleases, cryptoOf(b, i)})
	}
	again := func(s sample) float64 { return float64(s.again) / float64(s.crypto) }
	m := median(all, again)
	row("tier 3 release, issuer's CPU: asked again", micros(m.again), micros(m.crypto), again(m), "<= 1.3 of its own cryptography")
	first := func(s sample) float64 { return float64(s.first) / float64(s.crypto) }
	m = median(all, first)
	row("tier 3 release, issuer's CPU: whole session", micros(m.first), micros(m.crypto), first(m), "with connection and acknowledgement")
}

// serveReleases returns the CPU time of a session with so many releases.
func serveReleases(b *testing.T, i *benchIssuer, times int) (each time.Duration) {
	var ours []net.Conn
	var theirs []*os.File
	for range sessions {
		conn, f := socketPair(b)
		ours, theirs = append(ours, conn), append(theirs, f)
	}
	b.Run("", func(b *testing.T) { // which ends with the receiver's process
		startMode(b, theirs, "bench-receive", inject.PinOf(i.Identity).String(), strconv.Itoa(times))
		for _, f := range theirs {
			f.Close()
		}
		before := ownCPU(b)
		var parts sync.WaitGroup
		for _, conn := range ours {
			parts.Go(func() {
				if err := i.Serve(context.Background(), conn, i.door()); err != nil {
					b.Error(err)
				}
			})
		}
		parts.Wait()
		each = (ownCPU(b) - before) / sessions
	})
	return each
}

// cryptoOf is the CPU time of what an issuer computes for one release, and no more.
func cryptoOf(b testing.TB, i *benchIssuer) time.Duration {
	sk, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		b.Fatal(err)
	}
	pk, plain, nonce := sk.PublicKey().Bytes(), make([]byte, 160), make([]byte, 32)
	before := ownCPU(b)
	for range sessions {
		rand.Read(nonce)
		t := sha512.Sum512(tuple.Encode(i.Identity, []byte(benchSubject), nonce, pk, nonce))
		sha256.Sum256(pk)
		_, keyErr := i.key()
		public, err := hpke.MLKEM768X25519().NewPublicKey(pk)
		if err != nil {
			b.Fatal(err)
		}
		enc, sender, err := hpke.NewSender(public, hpke.HKDFSHA256(), hpke.AES256GCM(), t[:])
		if err != nil {
			b.Fatal(err)
		}
		ct, sealErr := sender.Seal(nil, plain)
		ackKey, exportErr := sender.Export("keybroker/v1 ack", 32)
		_, signErr := i.schedule.Sign(inject.LabelRelease, t[:], enc, ct)
		mac := hmac.New(sha256.New, ackKey)
		mac.Write(plain)
		if err := errors.Join(keyErr, sealErr, exportErr, signErr); err != nil || !hmac.Equal(mac.Sum(nil), mac.Sum(nil)) {
			b.Fatal(err)
		}
	}
	return (ownCPU(b) - before) / sessions
}

func ownCPU(b testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func socketPair(b testing.TB) (net.Conn, *os.File) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	one := os.NewFile(uintptr(fds[0]), "issuer")
	defer one.Close()
	conn, err := net.FileConn(one)
	if err != nil {
		b.Fatal(err)
	}
	return conn, os.NewFile(uintptr(fds[1]), "receiver")
}

// crowd is what so many guests at once cost.
type crowd struct {
	p50, p99  time.Duration // from the start of all to the acknowledgement
	cpu       time.Duration // of one guest, both sides
	idleBytes uint64        // of the issuer's heap and stacks for a session that has its keys
}

// benchGuests lets many guests ask at the same moment, all in this process.
func benchGuests(b *testing.T) {
	few, many := runCrowd(b, fewGuests), runCrowd(b, manyGuests)
	what := fmt.Sprintf("%d guests at once: ", manyGuests)
	row(what+"p50 to all keys held", micros(many.p50), "", 0, "")
	row(what+"p99", micros(many.p99), "", 0, "")
	row(what+"memory of an idle session", fmt.Sprintf("%d KiB", many.idleBytes>>10), fmt.Sprintf("%d KiB", few.idleBytes>>10), float64(many.idleBytes)/float64(few.idleBytes), fmt.Sprintf("1: as with %d guests", fewGuests))
	row(what+"CPU of a guest, both sides", micros(many.cpu), micros(few.cpu), float64(many.cpu)/float64(few.cpu), fmt.Sprintf("1: as with %d guests", fewGuests))
}

func runCrowd(b testing.TB, guests int) (c crowd) {
	i := newBenchIssuer(b)
	key, err := inject.NewReceiverKey()
	if err != nil {
		b.Fatal(err)
	}
	r := &inject.Receiver{Tier: inject.TierVM, Pins: []inject.Pin{inject.PinOf(i.Identity)}, Key: key}
	before := memory()
	var issuers, receivers sync.WaitGroup
	times := make([]time.Duration, guests)
	ends := make([]*os.File, guests)
	start, cpu := time.Now(), ownCPU(b)
	for n := range guests {
		conn, f := socketPair(b)
		ends[n] = f
		issuers.Go(func() { i.Serve(context.Background(), conn, i.door()) })
		receivers.Go(func() {
			theirs, err := net.FileConn(f)
			if err == nil {
				err = fetch(r, theirs, 1)
				theirs.Close() // a copy: the session stays
			}
			if err != nil {
				b.Error(err)
			}
			times[n] = time.Since(start)
		})
	}
	receivers.Wait()
	c.cpu = (ownCPU(b) - cpu) / time.Duration(guests)
	c.idleBytes = (memory() - before) / uint64(guests)
	for _, f := range ends {
		f.Close()
	}
	issuers.Wait()
	slices.Sort(times)
	c.p50, c.p99 = times[guests/2], times[guests*99/100]
	return c
}

// memory is what is in use of heap and stacks.
func memory() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// benchAgent measures the guest agent as it ships.
func benchAgent(b *testing.T) {
	dir := b.TempDir()
	agent, config := filepath.Join(dir, "keybroker-agent"), filepath.Join(dir, "agent.toml")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", agent, "keybroker/cmd/guest-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	text := fmt.Sprintf("tier = \"vm\"\nbroker = [%q]\n[[key]]\nname = \"disk\"\nsink = \"luks\"\ndevice = \"/dev/vdb\"\nmapper = \"data\"\n", inject.PinOf(make(ed25519.PublicKey, 32)))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	st, err := os.Stat(agent)
	if err != nil {
		b.Fatal(err)
	}
	row("agent: size, static and stripped", fmt.Sprintf("%.1f MB", float64(st.Size())/1e6), "8 MB", float64(st.Size())/8e6, "< 1")
	memory := memoryDir(b)
	var starts []time.Duration
	var peak int
	for n := range 21 {
		took, kib := startAgent(b, agent, config, filepath.Join(memory, fmt.Sprint(n)))
		starts, peak = append(starts, took), max(peak, kib)
	}
	row("agent: from exec to waiting for the broker", micros(median(starts, time.Duration.Seconds)), "", 0, "")
	row("agent: peak RSS so far", fmt.Sprintf("%.1f MB", float64(peak)/1e3), "20 MB", float64(peak)/20e3, "< 1")
}

// memoryDir is a folder in memory, where the agent's state must be.
func memoryDir(b testing.TB) string {
	for _, parent := range []string{os.Getenv("XDG_RUNTIME_DIR"), "/run", "/dev/shm"} {
		var fs unix.Statfs_t
		if unix.Statfs(parent, &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
			continue
		}
		if dir, err := os.MkdirTemp(parent, "keybroker-bench"); err == nil {
			b.Cleanup(func() { os.RemoveAll(dir) })
			return dir
		}
	}
	dir := b.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700"); err != nil {
		b.Skipf("no tmpfs to write to and none can be mounted (%v): run it as root", err)
	}
	b.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// startAgent runs the agent until it waits for the broker.
func startAgent(b testing.TB, agent, config, state string) (took time.Duration, peakKiB int) {
	cmd := exec.Command(agent, "-config", config, "-state-dir", state)
	out, err := cmd.StderrPipe()
	start := time.Now()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), "waiting for the broker") {
		b.Log(lines.Text())
	}
	took = time.Since(start)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, ok := bytes.Cut(status, []byte("VmHWM:"))
	if _, err := fmt.Sscan(string(rest), &peakKiB); !ok || err != nil {
		b.Fatalf("no peak RSS: %v", err)
	}
	return took, peakKiB
}
