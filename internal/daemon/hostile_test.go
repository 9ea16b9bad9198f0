package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"testing"

	"keybroker/derive"
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
		err = receive(os.Args[2], os.Args[3])
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

// startBroker runs a whole broker on a realm of its own, with a key for the service db.
func startBroker(t testing.TB) (broker *Broker, tcp, unixPath string) {
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
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	page, err := derive.NewPage()
	if err != nil {
		t.Fatal(err)
	}
	if err := derive.FillPage(page, []derive.Master{master}); err != nil {
		t.Fatal(err)
	}
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
