package passphrase

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keybroker/seal"
)

var binding = seal.Binding{Realm: seal.RealmID{1}, Slot: seal.SlotID{2}}

// cheap is a protector at the lowest cost.
func cheap(t testing.TB, text string) *Protector {
	t.Helper()
	ask := func(context.Context) ([]byte, error) { return []byte(text), nil }
	p, err := New(Config{Ask: ask, AskNew: ask, Time: minTime, MemoryKiB: minMemory, Threads: 1})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEnrollOpen(t *testing.T) {
	p := cheap(t, "correct horse")
	raw, k, err := p.Enroll(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Open(t.Context(), binding, raw)
	if err != nil || !again.Equal(k) {
		t.Fatalf("not the same key again: %v", err)
	}
	wrong, err := cheap(t, "correct house").Open(t.Context(), binding, raw)
	if err != nil || wrong.Equal(k) {
		t.Errorf("a wrong passphrase: %v", err)
	}
	for name, b := range map[string]seal.Binding{"realm": {Slot: binding.Slot}, "slot": {Realm: binding.Realm}} {
		if other, err := p.Open(t.Context(), b, raw); err != nil || other.Equal(k) {
			t.Errorf("the same key in another %s: %v", name, err)
		}
	}
	second, _, err := p.Enroll(t.Context(), binding)
	if err != nil || bytes.Equal(second, raw) {
		t.Error("the same salt twice")
	}
}

// DO NOT CHANGE: existing slots depend on it.
func TestGolden(t *testing.T) {
	raw := jsontext.Value(`{"kdf":"argon2id","time":1,"memory_kib":8192,"threads":1,"salt":"AAECAwQFBgcICQoLDA0ODw"}`)
	k, err := cheap(t, "correct horse").Open(t.Context(), binding, raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(k.Octets()); got != "ad97d768d68b4e683fdc646c9cdad6e4d46a4d74766456ebc37abd0f3c7c1e0e" {
		t.Errorf("the key is %s", got)
	}
	in := hex.EncodeToString(saltInput(binding, []byte("salt")))
	want := hex.EncodeToString([]byte("\x00\x00\x00\x1ckeybroker/v1 slot passphrase")) +
		"00000010" + "01000000000000000000000000000000" + "00000008" + "0200000000000000" + "0000000473616c74"
	if in != want {
		t.Errorf("the salt is %s, want %s", in, want)
	}
}

func TestDefaultCost(t *testing.T) {
	ask := func(context.Context) ([]byte, error) { return []byte("correct horse"), nil }
	p, err := New(Config{Ask: ask, AskNew: ask, Human: true})
	if err != nil {
		t.Fatal(err)
	}
	raw, k, err := p.Enroll(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	if what, err := p.Describe(raw); err != nil || what != "argon2id, 64 MiB, 3 passes" {
		t.Errorf("described as %q, %v", what, err)
	}
	// Another cost for new slots changes nothing for old ones.
	if again, err := cheap(t, "correct horse").Open(t.Context(), binding, raw); err != nil || !again.Equal(k) {
		t.Errorf("%v", err)
	}
	if !p.Interactive() || cheap(t, "x").Interactive() {
		t.Error("Interactive is wrong")
	}
}

func TestPassphraseBounds(t *testing.T) {
	for text, want := range map[string]error{
		"":                                     ErrNone,
		"seven77":                              ErrTooShort,
		strings.Repeat("x", MaxLength+1):       ErrTooLong,
		"\xff\x00 not UTF-8, and a zero octet": nil,
	} {
		if _, _, err := cheap(t, text).Enroll(t.Context(), binding); !errors.Is(err, want) {
			t.Errorf("%.20q: %v, want %v", text, err, want)
		}
	}
	raw, _, err := cheap(t, "correct horse").Enroll(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]error{"": ErrNone, strings.Repeat("x", MaxLength+1): ErrTooLong} {
		if _, err := cheap(t, text).Open(t.Context(), binding, raw); !errors.Is(err, want) {
			t.Errorf("opening by %.20q: %v", text, err)
		}
	}
}

// The cost that a file asks for is bounded before anything is computed, and nobody is asked for a passphrase.
func TestParamBounds(t *testing.T) {
	p, err := New(Config{Ask: func(context.Context) ([]byte, error) { t.Error("asked"); return nil, nil }})
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*params){
		"kdf":          func(p *params) { p.KDF = "argon2i" },
		"no time":      func(p *params) { p.Time = 0 },
		"time":         func(p *params) { p.Time = maxTime + 1 },
		"no memory":    func(p *params) { p.MemoryKiB = minMemory - 1 },
		"memory":       func(p *params) { p.MemoryKiB = maxMemory + 1 },
		"no threads":   func(p *params) { p.Threads = 0 },
		"threads":      func(p *params) { p.Threads = maxThreads + 1 },
		"threads wrap": func(p *params) { p.Threads = 257 },
		"short salt":   func(p *params) { p.Salt = p.Salt[:15] },
		"long salt":    func(p *params) { p.Salt = make([]byte, 65) },
	} {
		ps := params{KDF: kdfName, Time: 1, MemoryKiB: minMemory, Threads: 1, Salt: make([]byte, 16)}
		edit(&ps)
		raw, err := json.Marshal(&ps)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Open(t.Context(), binding, raw); !errors.Is(err, ErrParams) {
			t.Errorf("%s: %v", name, err)
		}
	}
	const salt = `{"kdf":"argon2id","time":3,"memory_kib":65536,"threads":4,"salt":"AAECAwQFBgcI%sCQoLDA0ODw"}`
	if _, err := parse(fmt.Appendf(nil, salt, "")); err != nil {
		t.Errorf("a salt: %v", err)
	}
	if _, err := parse(fmt.Appendf(nil, salt, `\n`)); !errors.Is(err, ErrParams) {
		t.Errorf("a salt on two lines: %v", err)
	}
	if _, err := New(Config{MemoryKiB: 1}); err == nil {
		t.Error("a cost out of bounds was taken")
	}
}

func TestNoSource(t *testing.T) {
	p, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Enroll(t.Context(), binding); err == nil {
		t.Error("enrolled without a passphrase")
	}
}

// Parameters that are read are within bounds and encode to what reads the same; an error means none, and quotes nothing.
func FuzzParseParams(f *testing.F) {
	f.Add([]byte(`{"kdf":"argon2id","time":3,"memory_kib":65536,"threads":4,"salt":"AAECAwQFBgcICQoLDA0ODw"}`))
	f.Add([]byte(`{"kdf":"argon2id","time":4294967295,"memory_kib":0,"threads":4,"salt":""}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := parse(raw)
		if err != nil {
			if err.Error() != ErrParams.Error() {
				t.Fatal(err)
			}
			return
		}
		if err := p.check(); err != nil {
			t.Fatal("out of bounds")
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if q, err := parse(again); err != nil || q.Time != p.Time || q.MemoryKiB != p.MemoryKiB || q.Threads != p.Threads || !bytes.Equal(q.Salt, p.Salt) {
			t.Fatalf("read again as %v, %v", q, err)
		}
	})
}
