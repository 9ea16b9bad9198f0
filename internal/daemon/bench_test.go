package daemon

import (
	"bufio"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/internal/config"
	"keybroker/internal/policy"
	"keybroker/seal"
	"keybroker/seal/passphrase"
)

const (
	loadConns = 64
	loadTime  = 2 * time.Second
	loadUID   = 1001 // root is not served over TCP
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "keyholder-serve":
			if err := derive.ServeHolder(derive.HolderPageFD, derive.HolderSocketFD); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		case "bench-load":
			load(os.Args[2], os.Args[3])
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// loadResult is what the load's process prints.
type loadResult struct {
	Requests int
	Seconds  float64
	P50, P99 time.Duration
	Failed   int
}

func (r loadResult) rate() float64 { return float64(r.Requests) / r.Seconds }

// load asks over loadConns connections, one request after the other on each, for loadTime.
func load(network, address string) {
	request := []byte("GET /v1/keys/db HTTP/1.1\r\nHost: " + hostOf(network, address) + "\r\nKeybroker: 1\r\n\r\n")
	var mu sync.Mutex
	var all []time.Duration
	var parts sync.WaitGroup
	failed := 0
	start := time.Now()
	for range loadConns {
		parts.Go(func() {
			mine, bad := oneConnection(network, address, request, start.Add(loadTime))
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

func hostOf(network, address string) string {
	if network == "unix" {
		return "localhost"
	}
	return address
}

func oneConnection(network, address string, request []byte, until time.Time) (times []time.Duration, failed int) {
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, 1
	}
	defer c.Close()
	in := bufio.NewReader(c)
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

// runLoad runs the load in a process of its own, as an ordinary user where this one is root.
func runLoad(b *testing.B, network, address string) (r loadResult) {
	b.Helper()
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
	return r
}

// BenchmarkService compares tier 1 (policy, audit, keyholder and the kernel's word on the caller) with a bare net/http handler
// that computes the same HKDF in its own process. Both serve the same 64 keep-alive connections, in turns.
func BenchmarkService(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("Linux only")
	}
	broker, tcp, unixPath := startForBench(b)
	_ = broker
	floorTCP, floorUnix := startFloor(b)
	for _, c := range []struct{ name, network, ours, floor string }{
		{"unix", "unix", unixPath, floorUnix}, {"tcp", "tcp", tcp, floorTCP},
	} {
		b.Run(c.name, func(b *testing.B) {
			var ours, floor loadResult
			for range b.N {
				floor = runLoad(b, c.network, c.floor)
				ours = runLoad(b, c.network, c.ours)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ours.rate(), "req/s")
			b.ReportMetric(floor.rate(), "floor-req/s")
			b.ReportMetric(ours.rate()/floor.rate(), "of-floor")
			b.ReportMetric(float64(ours.P50.Microseconds()), "p50-us")
			b.ReportMetric(float64(ours.P99.Microseconds()), "p99-us")
			b.ReportMetric(float64(floor.P99.Microseconds()), "floor-p99-us")
		})
	}
}

// startFloor serves the bare handler.
func startFloor(b *testing.B) (tcp, unixPath string) {
	secret := make([]byte, 32)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, err := hkdf.Key(sha256.New, secret, nil, strings.TrimPrefix(r.URL.Path, "/v1/keys/"), 32)
		if err != nil {
			b.Error(err)
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Write(key)
	})
	t, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	unixPath = filepath.Join(benchDir(b), "floor.sock")
	u, err := listenUnix(unixPath, 0o666)
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: h}
	go server.Serve(t)
	go server.Serve(u)
	b.Cleanup(func() { server.Close() })
	return t.Addr().String(), unixPath
}

// benchDir is a folder that the load's user may enter.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp("", "keybroker-bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	return dir
}

// startForBench runs a whole broker on a realm of its own.
func startForBench(b *testing.B) (broker *Broker, tcp, unixPath string) {
	dir := benchDir(b)
	paths, err := config.PathsUnder(dir)
	if err != nil {
		b.Fatal(err)
	}
	master := derive.RandomMaster()
	makeRealm(b, paths.Realm, master)
	text := fmt.Sprintf("[[service]]\nname = \"db\"\nuid = [%d, %d]\n", loadUID, os.Getuid())
	if err := os.WriteFile(paths.PolicyFile, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	settings := config.Default()
	settings.Listen = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	settings.Libvirt = nil
	broker, l, err := open(Config{
		Settings: settings, Paths: paths, Policy: policy.Source{File: paths.PolicyFile, Required: true}, Version: "bench",
		Log: slog.New(slog.DiscardHandler), Describe: func(seal.Slot) string { return "" },
	}, nil)
	if err != nil {
		b.Fatal(err)
	}
	page, err := derive.NewPage()
	if err != nil {
		b.Fatal(err)
	}
	if err := derive.FillPage(page, []derive.Master{master}); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- broker.serve(ctx, l, passed{fdPage: {page}}, nil) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
		broker.close()
	})
	for _, err := broker.realm.current(); err != nil; _, err = broker.realm.current() {
		runtime.Gosched()
	}
	return broker, l.tcp[0].Addr().String(), paths.Socket
}

func makeRealm(b *testing.B, path string, master derive.Master) {
	octets, err := master.Octets()
	if err != nil {
		b.Fatal(err)
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
		b.Fatal(err)
	}
	ask := func(context.Context) ([]byte, error) { return []byte("a passphrase of the benchmark"), nil }
	p, err := passphrase.New(passphrase.Config{Ask: ask, AskNew: ask, Time: 1, MemoryKiB: 8 << 10, Threads: 1})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := o.AddSlot(b.Context(), passphrase.Kind, p); err != nil {
		b.Fatal(err)
	}
	lock, err := seal.Lock(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	defer lock.Close()
	if err := lock.Create(o, nil); err != nil {
		b.Fatal(err)
	}
}
