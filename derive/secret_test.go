package derive

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	stdjson "encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"
)

func TestNewMaster(t *testing.T) {
	mixed := []byte("an0ther master, 32 octets long..")
	for _, c := range []struct {
		name   string
		octets []byte
		ok     bool
	}{
		{"nil", nil, false},
		{"one short", mixed[:31], false},
		{"one long", append(bytes.Clone(mixed), 1), false},
		{"hex of one", []byte(fmt.Sprintf("%x", mixed)), false},
		{"all zero", make([]byte, 32), false},
		{"all 0xff", bytes.Repeat([]byte{0xff}, 32), false},
		{"nearly all equal", append(make([]byte, 31), 1), true},
		{"mixed", mixed, true},
	} {
		m, err := NewMaster(c.octets)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && !m.Equal(Master{}) && m.access != nil {
			t.Errorf("%s: an error, and a master", c.name)
		}
		if err != nil && len(c.octets) > 0 && findLeak(err.Error(), c.octets) != "" {
			t.Errorf("%s: the error shows it: %v", c.name, err)
		}
	}
}

func TestNewMasterCopies(t *testing.T) {
	mine := []byte("an0ther master, 32 octets long..")
	m, err := NewMaster(mine)
	if err != nil {
		t.Fatal(err)
	}
	clear(mine)
	wantOctets(t, "master", octetsOf(t, m), []byte("an0ther master, 32 octets long.."))
}

func TestRandomMaster(t *testing.T) {
	a, b := RandomMaster(), RandomMaster()
	if a.Equal(b) || len(octetsOf(t, a)) != MasterSize {
		t.Error("two random masters are equal, or not of the right size")
	}
}

func TestKeysEqualAndWipe(t *testing.T) {
	s := testSchedule(t, 0)
	key := func(name string) ServiceKey {
		k, err := s.ServiceKey(name, 1, 32)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	a, again, b := key("a"), key("a"), key("b")
	if !a.Equal(again) || a.Equal(b) {
		t.Error("equality of keys is not that of their octets")
	}
	if (ServiceKey{}).Equal(ServiceKey{}) || a.Equal(ServiceKey{}) || (ServiceKey{}).Equal(a) {
		t.Error("a key equals the zero value")
	}
	dup, octets := a, octetsOf(t, a)
	dup.Wipe()
	if !isZero(octets) {
		t.Error("wiping left octets")
	}
	if _, err := a.Octets(); !errors.Is(err, ErrNoKey) {
		t.Errorf("octets of a wiped key: %v", err)
	}
	if a.Equal(again) || a.Equal(a) {
		t.Error("a wiped key equals one")
	}
	(ServiceKey{}).Wipe()
}

func TestZeroValuesAreRejected(t *testing.T) {
	for _, k := range []interface{ Octets() ([]byte, error) }{Master{}, ServiceKey{}, VMKey{}} {
		if b, err := k.Octets(); !errors.Is(err, ErrNoKey) || b != nil {
			t.Errorf("%T: %x, %v", k, b, err)
		}
	}
	if s, err := NewSchedule(Master{}); !errors.Is(err, ErrNoKey) || s != nil {
		t.Errorf("a schedule of no master: %v", err)
	}
}

func TestKeysAreIncomparable(t *testing.T) {
	for _, v := range []any{Master{}, ServiceKey{}, VMKey{}, Schedule{}} {
		if reflect.TypeOf(v).Comparable() {
			t.Errorf("%T can be compared with ==", v)
		}
	}
}

// What every nesting of a key looks like to a printer or an encoder.
func nestings[K any](k K) map[string]any {
	type hidden struct{ k K }
	type hiddenPointer struct{ k *K }
	type hiddenAny struct{ k any }
	type embedded struct{ hidden }
	p := &k
	return map[string]any{
		"value":              k,
		"pointer":            p,
		"pointer to pointer": &p,
		"exported field":     struct{ K K }{k},
		"exported pointer":   struct{ K *K }{p},
		"unexported field":   hidden{k},
		"unexported pointer": hiddenPointer{p},
		"unexported any":     hiddenAny{k},
		"embedded":           embedded{hidden{k}},
		"slice":              []K{k},
		"slice of pointers":  []*K{p},
		"map":                map[string]K{"k": k},
		"map of pointers":    map[string]*K{"k": p},
		"array":              [1]K{k},
		"slice of any":       []any{k},
		"slice of structs":   []hidden{{k}},
		"map of structs":     map[string]hidden{"k": {k}},
		"error":              fmt.Errorf("%v %w", k, errors.New("because")),
	}
}

// Every way out: what it writes of v, errors included.
func printers() map[string]func(v any) string {
	out := map[string]func(v any) string{}
	for _, verb := range strings.Split("v +v #v s +s d x X #x q +q #q o O b c U #U e g t T p w z 08x 60v", " ") {
		out["fmt %"+verb] = func(v any) string { return fmt.Sprintf("%"+verb, v) }
	}
	out["fmt.Sprint"] = func(v any) string { return fmt.Sprint(v) }
	out["fmt.Errorf"] = func(v any) string { return fmt.Errorf("x: %v", v).Error() }
	out["slog text"] = func(v any) string {
		var b strings.Builder
		slog.New(slog.NewTextHandler(&b, nil)).Info("m", "k", v, slog.Group("g", "k", v))
		return b.String()
	}
	out["slog json"] = func(v any) string {
		var b strings.Builder
		slog.New(slog.NewJSONHandler(&b, nil)).Info("m", "k", v, slog.Group("g", "k", v))
		return b.String()
	}
	out["encoding/json"] = func(v any) string { return encoded(stdjson.Marshal(v)) }
	out["go-json-experiment"] = func(v any) string { return encoded(json.Marshal(v)) }
	out["xml"] = func(v any) string { return encoded(xml.Marshal(v)) }
	out["gob"] = func(v any) string {
		var b bytes.Buffer
		return encoded(b.Bytes(), gob.NewEncoder(&b).Encode(v)) + b.String()
	}
	out["cmp"] = func(v any) (s string) {
		defer func() { s += fmt.Sprint(recover()) }()
		return cmp.Diff(v, nil) + cmp.Diff(nil, v, cmp.Exporter(func(reflect.Type) bool { return true }))
	}
	out["panic"] = func(v any) (s string) {
		defer func() { s = fmt.Sprint(recover()) }()
		panic(v)
	}
	return out
}

func encoded(b []byte, err error) string { return fmt.Sprint(string(b), err) }

// findLeak returns a way in which four octets of secret in a row show in s, or nothing.
func findLeak(s string, secret []byte) string {
	four := secret[:4]
	if strings.Contains(s, string(four)) {
		return "raw"
	}
	for shift := range 3 {
		if b64 := base64.RawStdEncoding.EncodeToString(secret[shift : shift+6]); strings.Contains(s, b64[:7]) {
			return "base64"
		}
	}
	for _, hex := range []string{fmt.Sprintf("%x", four), fmt.Sprintf("%X", four)} {
		if strings.Contains(s, hex) {
			return "hex"
		}
	}
	// As a list of numbers or characters. Something else than a digit parts them, or an address could look like it.
	for _, verb := range []string{"%d", "%x", "%X", "%o", "%b", "%c", "%q", "%+q", "%U", `\x%02x`, "%e", "%g"} {
		var parts []string
		for _, b := range four {
			parts = append(parts, regexp.QuoteMeta(fmt.Sprintf(verb, b)))
		}
		between := `[^0-9a-fA-F].{0,15}?`
		if strings.ContainsAny(verb, `cqU\`) {
			between = `.{0,16}?`
		}
		if regexp.MustCompile(strings.Join(parts, between)).MatchString(s) {
			return verb
		}
	}
	return ""
}

func countLeaks(t *testing.T, kind string, nested map[string]any, secret []byte, report bool) int {
	leaks := 0
	for nesting, v := range nested {
		for printer, print := range printers() {
			out := print(v)
			if how := findLeak(out, secret); how != "" {
				leaks++
				if report {
					t.Errorf("%s, %s, %s: shows as %s: %.200s", kind, nesting, printer, how, out)
				}
			}
		}
	}
	return leaks
}

// badKey is how a key must not be made: an array with a method that redacts.
type badKey [MasterSize]byte

func (badKey) Format(f fmt.State, _ rune)   { _, _ = f.Write([]byte(redacted)) }
func (badKey) MarshalText() ([]byte, error) { return nil, ErrSecret }

func TestKeysCannotBePrinted(t *testing.T) {
	m := testMaster(t, 0)
	s := testSchedule(t, 0)
	service, err := s.ServiceKey("a", 1, 64)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := s.VMKey(VMKeyID{TierVM, testSubject, "disk", 1, 32})
	if err != nil {
		t.Fatal(err)
	}
	countLeaks(t, "Master", nestings(m), octetsOf(t, m), true)
	countLeaks(t, "ServiceKey", nestings(service), octetsOf(t, service), true)
	countLeaks(t, "VMKey", nestings(vm), octetsOf(t, vm), true)
	prk, _ := s.prk.octets()
	countLeaks(t, "Schedule", nestings(s), prk, true)
	signer, _ := s.signer.octets()
	countLeaks(t, "Schedule's identity", nestings(s), signer, true)

	// The search finds what leaks.
	bad := badKey(octetsOf(t, m))
	if n := countLeaks(t, "badKey", nestings(bad), bad[:], false); n < 20 {
		t.Errorf("of an array with a redacting method only %d leaks were found", n)
	}
	if n := countLeaks(t, "[]byte", nestings(bad[:]), bad[:], false); n < 100 {
		t.Errorf("of plain octets only %d leaks were found", n)
	}
}

type inStruct struct{ K Master }

func TestEncodersRefuseKeys(t *testing.T) {
	m := testMaster(t, 0)
	for name, marshal := range map[string]func(any) ([]byte, error){
		"encoding/json":      stdjson.Marshal,
		"go-json-experiment": func(v any) ([]byte, error) { return json.Marshal(v) },
		"xml":                xml.Marshal,
	} {
		for _, v := range []any{m, &m, inStruct{m}, []Master{m}, map[string]Master{"k": m}} {
			if _, isMap := v.(map[string]Master); isMap && name == "xml" {
				continue // xml has no maps at all
			}
			if b, err := marshal(v); !errors.Is(err, ErrSecret) {
				t.Errorf("%s of %T: %q, %v", name, v, b, err)
			}
		}
	}
	if got := fmt.Sprintf("%v %+v %#v %x", m, m, m, m); got != strings.Repeat(redacted+" ", 3)+redacted {
		t.Errorf("printed as %q", got)
	}
}
