package seal

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	stdjson "encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
)

// No verb, logger or encoder shows a key, wherever in a value it lies.
func TestKeyCannotBePrinted(t *testing.T) {
	secret := []byte("0123456789abcdefghijklmnopqrstuv")
	k, err := NewKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	o := &Opened{share: k, masters: []Key{k}}
	type holder struct {
		inner Key
		Outer Key
	}
	values := []any{k, &k, []Key{k}, map[string]Key{"k": k}, holder{k, k}, &holder{k, k}, struct{ any }{k}, o, *o}
	var out bytes.Buffer
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%b", "%c", "%U", "%e", "%p", "%t"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v)
		encoders := map[string]func() ([]byte, error){
			"encoding/json": func() ([]byte, error) { return stdjson.Marshal(v) },
			"json":          func() ([]byte, error) { return json.Marshal(v) },
			"xml":           func() ([]byte, error) { return xml.Marshal(v) },
			"gob":           func() ([]byte, error) { var b bytes.Buffer; err := gob.NewEncoder(&b).Encode(v); return b.Bytes(), err },
		}
		for _, encode := range encoders {
			b, err := encode()
			out.Write(b)
			fmt.Fprintln(&out, err)
		}
	}
	checkAbsent(t, out.String(), secret)
}

func checkAbsent(t *testing.T, text string, secret []byte) {
	t.Helper()
	for form, s := range map[string]string{
		"raw": string(secret), "hex": fmt.Sprintf("%x", secret), "HEX": fmt.Sprintf("%X", secret),
		"base64":   base64.StdEncoding.EncodeToString(secret)[:40],
		"decimal":  strings.Trim(fmt.Sprint(secret[:8]), "[]"),
		"decimals": strings.ReplaceAll(strings.Trim(fmt.Sprint(secret[:8]), "[]"), " ", ","),
		"go":       "0x30, 0x31, 0x32",
	} {
		if strings.Contains(text, s) {
			t.Errorf("the key shows as %s", form)
		}
	}
}

func TestKey(t *testing.T) {
	a, b := RandomKey(), RandomKey()
	same, err := NewKey(a.Octets())
	if err != nil {
		t.Fatal(err)
	}
	if a.Equal(b) || !a.Equal(same) || a.Equal(Key{}) || (Key{}).Equal(Key{}) {
		t.Error("Equal is wrong")
	}
	a.Wipe()
	if !bytes.Equal(a.Octets(), make([]byte, KeySize)) || same.Equal(a) {
		t.Error("Wipe is wrong")
	}
	Key{}.Wipe()
	for _, octets := range [][]byte{nil, make([]byte, 31), make([]byte, 33), make([]byte, 32)} {
		if _, err := NewKey(octets); err == nil {
			t.Errorf("a key of %d octets", len(octets))
		}
	}
}

func TestIDs(t *testing.T) {
	id, err := ParseSlotID("00112233aabbccdd")
	if err != nil || id.String() != "00112233aabbccdd" {
		t.Errorf("%s, %v", id, err)
	}
	for _, s := range []string{"", "00112233AABBCCDD", "00112233aabbccd", "00112233aabbccddee", "zz112233aabbccdd"} {
		if _, err := ParseSlotID(s); err == nil {
			t.Errorf("read %q", s)
		}
		if _, err := ParseRealmID(s + s); err == nil {
			t.Errorf("read %q", s+s)
		}
	}
}

// Every error of Create and Open is one line.
func TestNoSlotError(t *testing.T) {
	err := error(&NoSlotError{Slots: []*SlotError{{Kind: "x", Err: ErrUnknownKind}}})
	if !errors.Is(err, ErrNoSlot) || !errors.Is(err, ErrUnknownKind) || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
}
