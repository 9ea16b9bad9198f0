package daemon

import (
	"bufio"
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"keybroker/derive"
)

const (
	loadConns  = 64
	loadTime   = time.Second
	loadRounds = 7 // each of both sides in turns; the median round counts
	loadUID    = 1001
)

var table = flag.Bool("table", false, "measure, and print the table of `make bench`")

// TestTable is `make bench`: it measures everything and prints one table. Each ratio is between two figures of the same run;
// docs/performance.md says how to read them.
func TestTable(t *testing.T) {
	if !*table {
		t.Skip("this measures for two minutes: `make bench` does it")
	}
	fmt.Printf(tableLine, "WHAT", "KEYBROKER", "AGAINST", "RATIO", "AIM")
	t.Run("service", benchService)
	t.Run("derive", benchDerive)
	t.Run("release", benchRelease)
	t.Run("guests", benchGuests)
	t.Run("agent", benchAgent)
}

const tableLine = "%-51s %11s %11s %6s  %s\n"

// An aim is what a ratio should be at least or at most, and what it is a ratio of. Without a bound there is no aim.
type aim struct {
	least, most float64
	of          string
}

// row prints one line of the table, with whether its aim is met. A zero ratio has no peer to compare with.
func row(what, ours, peer string, ratio float64, a aim) {
	shown, verdict := "", ""
	if ratio != 0 {
		shown = fmt.Sprintf("%.2f", ratio)
	}
	switch met := map[bool]string{true: "met", false: "NOT MET"}; {
	case a.least != 0:
		verdict = fmt.Sprintf(">= %.1f %s: ", a.least, met[ratio >= a.least])
	case a.most != 0:
		verdict = fmt.Sprintf("<= %.1f %s: ", a.most, met[ratio <= a.most])
	}
	fmt.Printf(tableLine, what, ours, peer, shown, verdict+a.of)
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
	fmt.Println(r.Requests, r.Failed, r.Seconds, int64(r.P50), int64(r.P99))
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
		_, err = fmt.Sscan(string(out), &r.Requests, &r.Failed, &r.Seconds, &r.P50, &r.P99)
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
	row(what+": requests/s", fmt.Sprintf("%.0f", m.ours.perSecond()), fmt.Sprintf("%.0f", m.floor.perSecond()), m.ratio(), aim{least: 0.7, of: "a bare net/http handler"})
	row(what+": p50", micros(m.ours.P50), micros(m.floor.P50), float64(m.ours.P50)/float64(m.floor.P50), aim{})
	row(what+": p99", micros(m.ours.P99), micros(m.floor.P99), float64(m.ours.P99)/float64(m.floor.P99), aim{})
	m = median(rounds, round.costRatio)
	row(what+": CPU of a request, client's too", micros(m.ours.cost()), micros(m.floor.cost()), m.costRatio(), aim{of: "a bare handler's; the ratio as for requests/s"})
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f us", float64(d)/1e3) }
func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }

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
		row(fmt.Sprintf("derivations/s by the keyholder, %d callers", callers), fmt.Sprintf("%.0f", holder), fmt.Sprintf("%.0f", software), holder/software, aim{of: "software, in process"})
	}
}

func startHolder(b testing.TB, master derive.Master) *derive.Holder {
	page := filledPage(b, master)
	defer page.Close()
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
