package main

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/internal/daemon"
)

// memoryOf reads all of a process's memory that can be read, and says which of the needles it holds.
func memoryOf(t *testing.T, pid int, needles map[string][]byte) (found []string) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	seen := map[string]bool{}
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' || to-from > 256<<20 {
			continue
		}
		region := make([]byte, to-from)
		n, _ := mem.ReadAt(region, int64(from)) // guard pages and secret memory cannot be read, which is the point
		for name, needle := range needles {
			seen[name] = seen[name] || bytes.Contains(region[:n], needle)
		}
	}
	for name, is := range seen {
		if is {
			found = append(found, name)
		}
	}
	return found
}

// TestMemory: neither master nor what is extracted from it nor the identity's seed is ever in the broker, and the master is not in
// the keyholder either. A mark that is in the broker is found, so the scan works.
func TestMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("reading the memory of a process that is not dumpable needs root: sudo go test ./cmd/broker")
	}
	dir := t.TempDir()
	state := filepath.Join(dir, "s")
	master := sha256.Sum256([]byte("a master that is looked for"))
	prk, err := hkdf.Extract(sha256.New, master[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	seed, err := hkdf.Expand(sha256.New, prk, string(derive.IdentityInfo(1)), 32)
	if err != nil {
		t.Fatal(err)
	}
	mark := fmt.Sprintf("mark-%x", sha256.Sum256([]byte("a mark that is looked for")))[:40]
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	phrase := fmt.Sprintf("%x", sha256.Sum256([]byte("a passphrase that is looked for"))) // not a constant: those are in the program
	pass := write("pass", phrase+"\n")
	succeed(t, "--state-dir", state, "init", "--slot", "passphrase", "--passphrase-file", pass, "--import", write("master", string(master[:])))
	write("s/broker.toml", fmt.Sprintf("passphrase_file = %q\nlibvirt = []\n", pass))
	write("s/policy.toml", "[[service]]\nname = \""+mark+"\"\nuid = [0]\n")

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	broker := keybroker(t, "--state-dir", state, "serve", "--listen", "127.0.0.1:"+freePort(t))
	broker.Stderr = os.Stderr
	if err := broker.Start(); err != nil {
		t.Fatal(err)
	}
	needles := map[string][]byte{"master": master[:], "PRK": prk, "seed": seed, "passphrase": []byte(phrase), "mark": []byte(mark)}
	g := &globals{stateDir: state}
	var s daemon.Status
	for s.Realm.State != "open" { // all along, also while the opener works
		if found := memoryOf(t, broker.Process.Pid, needles); len(found) > 1 || (len(found) == 1 && found[0] != "mark") {
			t.Fatalf("the broker holds %v while the realm opens", found)
		}
		g.ask(ctx, "GET", "/v1/status", &s)
		if ctx.Err() != nil {
			t.Fatal("the realm does not open")
		}
	}
	succeed(t, "--state-dir", state, "key", "get", mark, "--hex")
	if found := memoryOf(t, broker.Process.Pid, needles); len(found) != 1 || found[0] != "mark" {
		t.Errorf("the broker holds %v, expected the mark alone", found)
	}
	for _, name := range memoryOf(t, s.Realm.HolderPID, needles) {
		if name == "master" || name == "passphrase" {
			t.Errorf("the keyholder holds the %s", name)
		}
	}
	broker.Process.Signal(os.Interrupt)
	if err := broker.Wait(); err != nil {
		t.Errorf("the broker ended with %v", err)
	}
}

// succeed runs one command line, which must succeed.
func succeed(t *testing.T, args ...string) {
	t.Helper()
	if out, err := keybroker(t, args...).CombinedOutput(); err != nil {
		t.Fatalf("keybroker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
