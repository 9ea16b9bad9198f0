package e2e

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"keybroker/derive"
	"keybroker/internal/memtest"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

// A keyCatcher is a protector that notes the slot key which it recovers.
type keyCatcher struct {
	seal.Protector
	key []byte
}

func (c *keyCatcher) Open(ctx context.Context, b seal.Binding, params jsontext.Value) (seal.Key, error) {
	k, err := c.Protector.Open(ctx, b, params)
	if err == nil {
		c.key = bytes.Clone(k.Octets())
	}
	return k, err
}

// slotKeys opens each slot of a realm file and returns the slots' keys by kind.
func slotKeys(ctx context.Context, t *testing.T, path, phrase string) map[string][]byte {
	t.Helper()
	t2, err1 := tpm2.New(tpm2.Config{Path: tpm2.DefaultPath})
	pass, err2 := passphrase.New(passphrase.Config{Ask: func(context.Context) ([]byte, error) { return []byte(phrase), nil }})
	file, err3 := seal.Load(path)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	catchers := map[string]*keyCatcher{tpm2.Kind: {Protector: t2}, passphrase.Kind: {Protector: pass}}
	keys := map[string][]byte{}
	for _, s := range file.Slots() {
		c := seal.OpenConfig{
			Protectors: map[string]seal.Protector{tpm2.Kind: catchers[tpm2.Kind], passphrase.Kind: catchers[passphrase.Kind]},
			RealmID:    func(master []byte) ([16]byte, error) { return realmID(master) },
		}
		if err := file.Test(ctx, s.ID, c); err != nil {
			t.Fatal(err)
		}
		keys[s.Kind+"'s slot key"] = catchers[s.Kind].key
	}
	return keys
}

func realmID(master []byte) ([16]byte, error) {
	m, err := derive.NewMaster(master)
	if err != nil {
		return [16]byte{}, err
	}
	s, err := derive.NewSchedule(m)
	if err != nil {
		return [16]byte{}, err
	}
	return s.RealmID(), nil
}

// otherRealm puts a realm of its own in the place of the host's, until the test ends. The broker is stopped then and now.
func otherRealm(ctx context.Context, t *testing.T) {
	t.Helper()
	const kept = stateFolder + ".kept"
	sh(ctx, t, "systemctl stop keybroker.service; mv "+stateFolder+" "+kept)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		sh(ctx, t, "systemctl stop keybroker.service; rm -rf "+stateFolder+"; mv "+kept+" "+stateFolder)
		coldStart(ctx, t)
	})
}

// TestMemory: from before the realm opens on, neither master nor what is extracted from it, nor the identity's seed, a slot's key
// or the passphrase, is ever in the broker, and the keyholder has no more than it needs. A mark that is in the broker is found.
func TestMemory(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	otherRealm(ctx, t)

	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	hash := func(text string) []byte { h := sha256.Sum256([]byte(text)); return h[:] } // what is looked for stands in no program
	master, phrase, mark := hash("a master"), hex.EncodeToString(hash("a passphrase")), "mark-"+hex.EncodeToString(hash("a mark"))[:40]
	passFile := write("passphrase", []byte(phrase+"\n"))
	sh(ctx, t, "keybroker init --slot tpm2 --slot passphrase --passphrase-file "+passFile+" --import "+write("master", master))

	prk, err := hkdf.Extract(sha256.New, master, nil)
	if err != nil {
		t.Fatal(err)
	}
	seed, err := hkdf.Expand(sha256.New, prk, string(derive.IdentityInfo(1)), 32)
	if err != nil {
		t.Fatal(err)
	}
	needles := slotKeys(ctx, t, stateFolder+"/realm.json", phrase)
	if len(needles) != 2 {
		t.Fatalf("keys of %d slots", len(needles))
	}
	for name, octets := range map[string][]byte{"master": master, "PRK": prk, "seed": seed, "passphrase": []byte(phrase), "mark": []byte(mark)} {
		needles[name] = octets
	}
	broker := func(when string) {
		t.Helper()
		began := time.Now()
		found, err := memtest.Scan(mainPID(ctx, t), needles)
		t.Logf("%s: scanned in %v", when, time.Since(began).Round(time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(found, []string{"mark"}) {
			t.Errorf("%s the broker holds %q, expected the mark alone", when, found)
		}
	}
	holder := func(when string) {
		t.Helper()
		found, err := memtest.Scan(status(ctx, t).Realm.HolderPID, needles)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s the keyholder holds, outside of its secret page, %q", when, found)
		for _, name := range found {
			if name != "seed" && name != "mark" { // it signs with the one, and is asked for a key of the other
				t.Errorf("%s the keyholder holds the %s", when, name)
			}
		}
	}

	settings(t, "slots = [\"passphrase\"]\n")
	sh(ctx, t, "systemctl start keybroker.service")
	admit(ctx, t, "mark", "[[service]]\nname = \""+mark+"\"\nuid = [1001]\n")
	broker("while it waits for a passphrase")
	unlocking := make(chan error, 1)
	unlock := exec.CommandContext(step(ctx, t), "keybroker", "unlock", "--passphrase-file", passFile)
	go func() {
		out, err := unlock.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("unlocking: %w: %s", err, out)
		}
		unlocking <- err
	}()
	for scans, open := 1, false; !open; scans++ {
		broker("while a passphrase opens the realm")
		select {
		case err := <-unlocking:
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d scans during the unlock", scans)
			open = true
		default:
		}
	}
	brokerOpen(ctx, t)
	broker("after the unlock")
	holder("after the unlock")

	if err := os.Remove(brokerTOML); err != nil {
		t.Fatal(err)
	}
	sh(ctx, t, "keybroker lock")
	startAnew(ctx, t)
	brokerOpen(ctx, t)
	if by := status(ctx, t).Realm.OpenedBy; !strings.Contains(by, tpm2.Kind) {
		t.Errorf("opened by %q", by)
	}
	broker("after the TPM opened it")
	holder("after the TPM opened it")

	g := admitted(ctx, t, "scanned")
	g.start()
	g.open()
	for range 20 {
		asService(ctx, t, "keybroker key get "+mark+" --hex")
	}
	broker("after releases")
	holder("after releases")

	sh(ctx, t, "systemctl restart keybroker.service")
	brokerOpen(ctx, t)
	broker("after a restart")
	holder("after a restart")
}
