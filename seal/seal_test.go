package seal_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"keybroker/internal/need"
	"keybroker/seal"
	"keybroker/seal/passphrase"
)

var master = bytes.Repeat([]byte{0x5a}, seal.MasterSize)

// realmID stands for the key schedule, which this package does not know.
func realmID(m []byte) ([16]byte, error) {
	h := sha256.Sum256(m)
	return [16]byte(h[:16]), nil
}

// phrase is a passphrase protector at the lowest cost.
func phrase(t testing.TB, text string) *passphrase.Protector {
	t.Helper()
	ask := func(context.Context) ([]byte, error) { return []byte(text), nil }
	p, err := passphrase.New(passphrase.Config{Ask: ask, AskNew: ask, Time: 1, MemoryKiB: 8 << 10, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// byPhrase opens passphrase slots.
func byPhrase(t testing.TB, text string) seal.OpenConfig {
	return seal.OpenConfig{RealmID: realmID, Protectors: map[string]seal.Protector{passphrase.Kind: phrase(t, text)}}
}

// create makes a realm with one slot per passphrase.
func create(t testing.TB, phrases ...string) *seal.Opened {
	t.Helper()
	o, err := seal.Create(master, realmID)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range phrases {
		if _, err := o.AddSlot(t.Context(), passphrase.Kind, phrase(t, text)); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

func encode(t testing.TB, f *seal.File) []byte {
	t.Helper()
	octets, err := f.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return octets
}

func parse(t testing.TB, octets []byte) *seal.File {
	t.Helper()
	f, err := seal.Parse(octets)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// resum gives an edited file a right checksum, as somebody who knows the format could.
func resum(octets []byte) []byte {
	const prefix, suffix = ",\n  \"sum\": \"", "\"\n}\n"
	body := octets[:max(0, len(octets)-len(prefix)-64-len(suffix))]
	label := []byte("keybroker/v1 realm sum")
	h := sha256.New()
	for _, field := range [][]byte{label, body} {
		h.Write([]byte{byte(len(field) >> 24), byte(len(field) >> 16), byte(len(field) >> 8), byte(len(field))})
		h.Write(field)
	}
	return []byte(string(body) + prefix + hex.EncodeToString(h.Sum(nil)) + suffix)
}

func edit(t testing.TB, octets []byte, from, to string) []byte {
	t.Helper()
	if !bytes.Contains(octets, []byte(from)) {
		t.Fatalf("the file has no %q", from)
	}
	return resum(bytes.Replace(octets, []byte(from), []byte(to), 1))
}

func TestRealm(t *testing.T) {
	o := create(t, "first passphrase", "second passphrase")
	f := parse(t, encode(t, o.File()))
	want, _ := realmID(master)
	if f.RealmID() != want || f.Require() != 1 || f.Generations() != 1 || len(f.Slots()) != 2 {
		t.Fatalf("read back realm %s, require %d, %d generations, %d slots", f.RealmID(), f.Require(), f.Generations(), len(f.Slots()))
	}
	for i, text := range []string{"first passphrase", "second passphrase"} {
		again, err := f.Open(t.Context(), byPhrase(t, text))
		if err != nil {
			t.Fatal(err)
		}
		if got := again.Masters(); len(got) != 1 || !bytes.Equal(got[0], master) {
			t.Error("opened to another master")
		}
		if again.Slot().ID != f.Slots()[i].ID {
			t.Errorf("%q opened slot %s", text, again.Slot().ID)
		}
		m := again.Masters()[0]
		again.Close()
		if !bytes.Equal(m, make([]byte, seal.MasterSize)) {
			t.Error("the master is not wiped")
		}
	}
}

func TestWrongPassphrase(t *testing.T) {
	f := create(t, "first passphrase", "second passphrase").File()
	o, err := f.Open(t.Context(), byPhrase(t, "third passphrase"))
	if o != nil || !errors.Is(err, seal.ErrNoSlot) || !errors.Is(err, passphrase.ErrWrong) {
		t.Fatalf("got %v, %v", o, err)
	}
	var none *seal.NoSlotError
	if !errors.As(err, &none) || len(none.Slots) != 2 || none.Slots[0].Slot != f.Slots()[0].ID {
		t.Errorf("the error has not every slot's reason: %v", err)
	}
	if strings.ContainsAny(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
}

func TestUnknownKind(t *testing.T) {
	f := create(t, "first passphrase").File()
	_, err := f.Open(t.Context(), seal.OpenConfig{RealmID: realmID})
	if !errors.Is(err, seal.ErrUnknownKind) {
		t.Errorf("got %v", err)
	}
}

func TestRequiredConfig(t *testing.T) {
	if _, err := seal.Create(master, nil); err == nil {
		t.Error("created without RealmID")
	}
	if _, err := create(t, "first passphrase").File().Open(t.Context(), seal.OpenConfig{}); err == nil || errors.Is(err, seal.ErrNoSlot) {
		t.Errorf("opened without RealmID: %v", err)
	}
	for _, m := range [][]byte{nil, make([]byte, 32), master[:31]} {
		if _, err := seal.Create(m, realmID); err == nil {
			t.Errorf("created with a master of %d octets, zero or short", len(m))
		}
	}
}

func TestPin(t *testing.T) {
	f := create(t, "first passphrase").File()
	c := byPhrase(t, "first passphrase")
	pin := f.RealmID()
	c.Pin = &pin
	if _, err := f.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	pin[0] ^= 1
	if _, err := f.Open(t.Context(), c); !errors.Is(err, seal.ErrOtherRealm) || errors.Is(err, seal.ErrNoSlot) {
		t.Errorf("another pin: %v", err)
	}
}

// A file whose master gives another id than it says is another realm's.
func TestMasterOfAnotherRealm(t *testing.T) {
	f := create(t, "first passphrase").File()
	c := byPhrase(t, "first passphrase")
	c.RealmID = func([]byte) ([16]byte, error) { return [16]byte{1}, nil }
	if o, err := f.Open(t.Context(), c); o != nil || !errors.Is(err, seal.ErrOtherRealm) {
		t.Errorf("got %v, %v", o, err)
	}
}

// kind is a protector that counts: it opens with a fixed key, or fails.
type kind struct {
	human bool
	fail  error
	tried *[]string
	name  string
}

func (k kind) Enroll(context.Context, seal.Binding) (jsontext.Value, seal.Key, error) {
	key, err := seal.NewKey(bytes.Repeat([]byte{9}, 32))
	return jsontext.Value(`{"b": 1, "a": [1, 2]}`), key, err
}

func (k kind) Open(context.Context, seal.Binding, jsontext.Value) (seal.Key, error) {
	*k.tried = append(*k.tried, k.name)
	if k.fail != nil {
		return seal.Key{}, k.fail
	}
	return seal.NewKey(bytes.Repeat([]byte{9}, 32))
}

func (k kind) Interactive() bool { return k.human }

func TestOrder(t *testing.T) {
	var tried []string
	fail := errors.New("no")
	protectors := map[string]seal.Protector{
		"human":   kind{human: true, fail: fail, tried: &tried, name: "human"},
		"machine": kind{fail: fail, tried: &tried, name: "machine"},
		"other":   kind{fail: fail, tried: &tried, name: "other"},
	}
	o := create(t)
	for _, name := range []string{"human", "machine", "other"} {
		if _, err := o.AddSlot(t.Context(), name, protectors[name]); err != nil {
			t.Fatal(err)
		}
	}
	first := o.File().Slots()[0].ID
	for _, c := range []struct {
		name string
		conf seal.OpenConfig
		want []string
	}{
		{"nil: those that need a human last", seal.OpenConfig{}, []string{"machine", "other", "human"}},
		{"given", seal.OpenConfig{Order: []string{"other", "human"}}, []string{"other", "human"}},
		{"empty is none", seal.OpenConfig{Order: []string{}}, nil},
		{"only", seal.OpenConfig{Only: &first}, []string{"human"}},
		{"except", seal.OpenConfig{Except: &first}, []string{"machine", "other"}},
	} {
		tried = nil
		c.conf.RealmID, c.conf.Protectors = realmID, protectors
		if _, err := o.File().Open(t.Context(), c.conf); !errors.Is(err, seal.ErrNoSlot) {
			t.Errorf("%s: %v", c.name, err)
		}
		if !slices.Equal(tried, c.want) {
			t.Errorf("%s: tried %q, want %q", c.name, tried, c.want)
		}
	}
}

// An end of the context is not a slot's fault, and stops the trying.
func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var tried []string
	o := create(t)
	p := kind{fail: context.Canceled, tried: &tried, name: "x"}
	o.AddSlot(t.Context(), "x", p)
	o.AddSlot(t.Context(), "x", p)
	_, err := o.File().Open(ctx, seal.OpenConfig{RealmID: realmID, Protectors: map[string]seal.Protector{"x": p}})
	if !errors.Is(err, context.Canceled) || errors.Is(err, seal.ErrNoSlot) || len(tried) != 1 {
		t.Errorf("%v after %d tries", err, len(tried))
	}
}

func TestAddRemove(t *testing.T) {
	o := create(t, "first passphrase")
	again, err := o.File().Open(t.Context(), byPhrase(t, "first passphrase"))
	if err != nil {
		t.Fatal(err)
	}
	added, err := again.AddSlot(t.Context(), passphrase.Kind, phrase(t, "second passphrase"))
	if err != nil {
		t.Fatal(err)
	}
	f := parse(t, encode(t, again.File()))
	if err := f.Test(t.Context(), added.ID, byPhrase(t, "second passphrase")); err != nil {
		t.Errorf("the added slot: %v", err)
	}
	if err := f.Test(t.Context(), added.ID, byPhrase(t, "first passphrase")); !errors.Is(err, passphrase.ErrWrong) {
		t.Errorf("Test opened by another slot: %v", err)
	}
	if err := f.Test(t.Context(), seal.SlotID{}, byPhrase(t, "first passphrase")); !errors.Is(err, seal.ErrSlotNotFound) {
		t.Errorf("Test of no slot: %v", err)
	}
	if err := again.RemoveSlot(o.File().Slots()[0].ID); err != nil {
		t.Fatal(err)
	}
	if err := again.RemoveSlot(seal.SlotID{}); !errors.Is(err, seal.ErrSlotNotFound) {
		t.Errorf("removed no slot: %v", err)
	}
	f = parse(t, encode(t, again.File()))
	if _, err := f.Open(t.Context(), byPhrase(t, "first passphrase")); !errors.Is(err, passphrase.ErrWrong) {
		t.Errorf("the removed slot opens: %v", err)
	}
	if _, err := f.Open(t.Context(), byPhrase(t, "second passphrase")); err != nil {
		t.Error(err)
	}
	if len(o.File().Slots()) != 1 {
		t.Error("a File changed")
	}
}

// Whatever is edited by somebody who can compute the checksum is noticed once a slot opens, or that slot does not open.
func TestEdited(t *testing.T) {
	o := create(t, "first passphrase")
	var tried []string
	p := kind{tried: &tried}
	if _, err := o.AddSlot(t.Context(), "other", p); err != nil {
		t.Fatal(err)
	}
	good := encode(t, o.File())
	slot := o.File().Slots()[0]
	for _, c := range []struct {
		name     string
		from, to string
	}{
		{"created", slot.Created.Format(time.RFC3339), "2001-01-01T00:00:00Z"},
		{"kind", `"other"`, `"othex"`},
		{"param", `"time": 1`, `"time": 2`},
		{"number", `"a": [`, `"c": [`},
	} {
		f := parse(t, edit(t, good, c.from, c.to))
		both := byPhrase(t, "first passphrase")
		both.Protectors["other"], both.Protectors["othex"] = p, p
		if o, err := f.Open(t.Context(), both); o != nil || !errors.Is(err, seal.ErrEdited) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	f := parse(t, edit(t, good, `"a": [`, `"c": [`))
	_, err := f.Open(t.Context(), seal.OpenConfig{RealmID: realmID, Protectors: map[string]seal.Protector{"other": p}})
	if !errors.Is(err, seal.ErrSlotEdited) {
		t.Errorf("an edited slot that is no passphrase's: %v", err)
	}
}

func TestVersions(t *testing.T) {
	good := encode(t, create(t, "first passphrase").File())
	newer := bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1)
	for _, c := range []struct {
		name   string
		octets []byte
		want   error
		not    error
	}{
		{"newer", resum(newer), seal.ErrNewer, seal.ErrCorrupt},
		{"newer, or damaged", newer, seal.ErrNewer, nil},
		{"require", edit(t, good, `"require": 1`, `"require": 2`), seal.ErrNewer, seal.ErrCorrupt},
		{"version 0", edit(t, good, `"version": 1`, `"version": 0`), seal.ErrCorrupt, seal.ErrNewer},
		{"unknown member", edit(t, good, `"require"`, `"x": 1, "require"`), seal.ErrCorrupt, seal.ErrNewer},
		{"other case", edit(t, good, `"require"`, `"Require"`), seal.ErrCorrupt, nil},
		{"repeated", edit(t, good, `"require": 1`, `"require": 1, "require": 1`), seal.ErrCorrupt, nil},
		{"not canonical", edit(t, good, `"require": 1`, `"require":  1`), seal.ErrCorrupt, nil},
		{"no realm file", []byte("hello\n"), seal.ErrTruncated, nil},
		{"empty", nil, seal.ErrTruncated, nil},
		{"huge", make([]byte, 2<<20), seal.ErrCorrupt, nil},
	} {
		f, err := seal.Parse(c.octets)
		if f != nil || !errors.Is(err, c.want) || c.not != nil && errors.Is(err, c.not) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// damageErrors are all that Parse may say of a damaged file: nothing of its content.
var damageErrors = map[string]bool{
	seal.ErrTruncated.Error(): true,
	seal.ErrCorrupt.Error():   true,
	seal.ErrNewer.Error() + ", by the version that it gives, or: " + seal.ErrCorrupt.Error():   true,
	seal.ErrNewer.Error() + ", by the version that it gives, or: " + seal.ErrTruncated.Error(): true,
}

func TestEveryCut(t *testing.T) {
	good := encode(t, create(t, "first passphrase").File())
	for n := range good {
		f, err := seal.Parse(good[:n])
		if f != nil || err == nil || !damageErrors[err.Error()] {
			t.Fatalf("cut to %d octets: %v", n, err)
		}
	}
}

func TestEveryFlip(t *testing.T) {
	good := encode(t, create(t, "first passphrase").File())
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			f, err := seal.Parse(bad)
			if f != nil || err == nil || !damageErrors[err.Error()] {
				t.Fatalf("octet %d, bit %d: %v", i, bit, err)
			}
		}
	}
}

func lock(t *testing.T, path string) *seal.Locked {
	t.Helper()
	l, err := seal.Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "realm [1].json")
	if _, err := seal.Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("no file: %v", err)
	}
	o := create(t, "first passphrase")
	l := lock(t, path)
	if err := l.Save(o); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("saved over nothing: %v", err)
	}
	if err := l.Create(o, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Create(o, nil); !errors.Is(err, seal.ErrExists) {
		t.Errorf("created twice: %v", err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := seal.Lock(ctx, path); !errors.Is(err, seal.ErrBusy) {
		t.Errorf("locked twice: %v", err)
	}
	o.AddSlot(t.Context(), passphrase.Kind, phrase(t, "second passphrase"))
	if err := l.Save(o); err != nil {
		t.Fatal(err)
	}
	l.Close()
	defer lock(t, path).Close()
	if f, err := seal.Load(path); err != nil || len(f.Slots()) != 2 {
		t.Errorf("after Save: %v", err)
	}
}

// The broker's user owns the file that root makes and changes for it.
func TestOwner(t *testing.T) {
	need.Root(t)
	path := filepath.Join(t.TempDir(), "realm.json")
	o := create(t, "first passphrase")
	l := lock(t, path)
	defer l.Close()
	if err := l.Create(o, &seal.Owner{UID: 65534, GID: 65534}); err != nil {
		t.Fatal(err)
	}
	if err := l.Save(o); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 65534 || st.Gid != 65534 || info.Mode() != 0o600 {
		t.Errorf("uid %d, gid %d, mode %v", st.Uid, st.Gid, info.Mode())
	}
}

// Two commands at once: neither loses the other's slot.
func TestConcurrentChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "realm.json")
	o := create(t, "first passphrase")
	l := lock(t, path)
	if err := l.Create(o, nil); err != nil {
		t.Fatal(err)
	}
	l.Close()
	done := make(chan error)
	const n = 4
	for range n {
		go func() { done <- addOne(t, path) }()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if f, err := seal.Load(path); err != nil || len(f.Slots()) != 1+n {
		t.Errorf("%d slots, %v", len(f.Slots()), err)
	}
}

func addOne(t *testing.T, path string) error {
	l, err := seal.Lock(t.Context(), path)
	if err != nil {
		return err
	}
	defer l.Close()
	f, err := l.Load()
	if err != nil {
		return err
	}
	o, err := f.Open(t.Context(), byPhrase(t, "first passphrase"))
	if err != nil {
		return err
	}
	if _, err := o.AddSlot(t.Context(), passphrase.Kind, phrase(t, "another passphrase")); err != nil {
		return err
	}
	return l.Save(o)
}

func TestLoadOddFiles(t *testing.T) {
	dir := t.TempDir()
	if _, err := seal.Load(dir); err == nil {
		t.Error("a folder was read")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := mkfifo(fifo); err != nil {
		t.Fatal(err)
	}
	if _, err := seal.Load(fifo); err == nil {
		t.Error("a FIFO was read")
	}
}

// Parse ok means Encode gives the same octets; an error means no file. Every input is tried as it is and with a right checksum,
// without which none would get past it.
func FuzzParse(f *testing.F) {
	good := encode(f, create(f, "first passphrase").File())
	f.Add(good)
	f.Add(encode(f, create(f).File()))
	f.Add(edit(f, good, `"version": 1`, `"version": 9`))
	f.Fuzz(func(t *testing.T, octets []byte) {
		for _, in := range [][]byte{octets, resum(octets)} {
			file, err := seal.Parse(in)
			if err != nil {
				if file != nil {
					t.Fatal("a file and an error")
				}
				known := errors.Is(err, seal.ErrTruncated) || errors.Is(err, seal.ErrCorrupt) || errors.Is(err, seal.ErrNewer)
				if !known {
					t.Fatalf("an error that no caller knows: %v", err)
				}
				continue
			}
			again, err := file.Encode()
			if err != nil || !bytes.Equal(again, in) {
				t.Fatalf("encoded to other octets: %v", err)
			}
		}
	})
}
