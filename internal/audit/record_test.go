package audit

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"
)

// full has every field that a record can have, with characters that need care.
func full() *Record {
	return &Record{
		Seq: 7, Prev: Hash{1, 2, 3}, Time: time.Date(2026, 11, 21, 12, 0, 0, 120_000_000, time.UTC),
		Event: EventRelease, Decision: Granted, Code: "no-policy", Reason: "quote \" back \\ tab \t nul \x00 del \x7f ü 😀 </script> \u2028", Count: 3,
		Tier: "vm", Subject: "11111111-2222-3333-4444-555555555555", Names: []string{"app", "disk"}, Epochs: []uint32{1, 4_000_000_000},
		Kind: "none", Instance: "i", Peer: "cid 7", Caller: &Caller{UID: 0, Unit: "/system.slice/a\\x2db.service", PID: 12}, Rule: "vm[1]",
		Transcript: strings.Repeat("0a", 64), Receiver: strings.Repeat("1b", 32), Policy: strings.Repeat("2c", 32), Evidence: strings.Repeat("3d", 32),
	}
}

func checkpoint() *Record {
	return &Record{Seq: 8, Time: time.Unix(1, 0).UTC(), Event: EventCheckpoint, Checkpoint: &Checkpoint{
		Seq: 7, Hash: Hash{9}, Time: time.Unix(1, 5).UTC(), Realm: testRealm, Signature: strings.Repeat("A", 86),
	}}
}

// DO NOT CHANGE: the hashes of every log depend on these octets.
func TestEncodeGolden(t *testing.T) {
	want := `{"seq":2,"prev":"0500000000000000000000000000000000000000000000000000000000000000","time":"2026-11-21T12:00:00.5Z",` +
		`"event":"release","decision":"granted","tier":"service","subject":"db","names":["db"],"epochs":[1],` +
		`"caller":{"uid":0,"unit":"/system.slice/db.service","pid":9},"rule":"service[1]"}`
	r := &Record{
		Seq: 2, Prev: Hash{5}, Time: time.Date(2026, 11, 21, 13, 0, 0, 500_000_000, time.FixedZone("CET", 3600)), Event: EventRelease,
		Decision: Granted, Tier: "service", Subject: "db", Names: []string{"db"}, Epochs: []uint32{1},
		Caller: &Caller{Unit: "/system.slice/db.service", PID: 9}, Rule: "service[1]",
	}
	if got := string(r.Encode(nil)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// The hand-written encoder writes what the JSON library writes, field by field, and Parse reads it back.
func TestEncodeIsTheLibrarysJSON(t *testing.T) {
	records := []*Record{full(), checkpoint(), {Event: EventStart}}
	for i := range reflect.TypeFor[Record]().NumField() { // each field alone left out
		r := full()
		f := reflect.ValueOf(r).Elem().Field(i)
		f.SetZero()
		records = append(records, r)
	}
	for _, r := range records {
		want, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got := r.Encode(nil)
		if !bytes.Equal(got, want) {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
		if r.check() != nil { // no event, or epochs without names
			continue
		}
		back, err := Parse(got)
		if err != nil {
			t.Fatalf("%s: %v", got, err)
		}
		if diff := cmp.Diff(r, back); diff != "" {
			t.Error(diff)
		}
	}
}

// A line has one spelling. Any other, though it means the same, could hide an edit.
func TestParseIsStrict(t *testing.T) {
	good := string(full().Encode(nil))
	if _, err := Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	sign := string(checkpoint().Encode(nil))
	for name, line := range map[string]string{
		"empty":                 "",
		"space":                 strings.Replace(good, `":`, `": `, 1),
		"space after":           good + " ",
		"two":                   good + good,
		"unknown field":         strings.Replace(good, `"tier"`, `"tear"`, 1),
		"mis-cased field":       strings.Replace(good, `"tier"`, `"Tier"`, 1),
		"repeated field":        strings.Replace(good, `"tier":"vm"`, `"tier":"vm","tier":"vm"`, 1),
		"empty field":           strings.Replace(good, `"tier":"vm"`, `"tier":""`, 1),
		"null":                  strings.Replace(good, `"tier":"vm"`, `"tier":null`, 1),
		"other order":           strings.Replace(good, `"tier":"vm","subject":"11111111-2222-3333-4444-555555555555"`, `"subject":"11111111-2222-3333-4444-555555555555","tier":"vm"`, 1),
		"escape":                strings.Replace(good, `"vm"`, `"\u0076m"`, 1),
		"number as text":        strings.Replace(good, `"seq":7`, `"seq":"7"`, 1),
		"fraction":              strings.Replace(good, `"seq":7`, `"seq":7.0`, 1),
		"exponent":              strings.Replace(good, `"seq":7`, `"seq":7e0`, 1),
		"negative":              strings.Replace(good, `"seq":7`, `"seq":-7`, 1),
		"too large":             strings.Replace(good, `"seq":7`, `"seq":18446744073709551616`, 1),
		"zone":                  strings.Replace(good, `T12:00:00.12Z`, `T13:00:00.12+01:00`, 1),
		"trailing zero":         strings.Replace(good, `00.12Z`, `00.120Z`, 1),
		"upper-case hash":       strings.Replace(good, strings.Repeat("0a", 64), strings.Repeat("0A", 64), 1),
		"short hash":            strings.Replace(good, strings.Repeat("1b", 32), strings.Repeat("1b", 31), 1),
		"short prev":            strings.Replace(good, `"prev":"01`, `"prev":"`, 1),
		"bad UTF-8":             strings.Replace(good, `"vm"`, "\"v\xffm\"", 1),
		"empty list":            strings.Replace(good, `["app","disk"]`, `[]`, 1),
		"more names":            strings.Replace(good, `["app","disk"]`, `["app","disk","x"]`, 1),
		"decision":              strings.Replace(good, `"granted"`, `"maybe"`, 1),
		"no event":              strings.Replace(good, `"event":"release",`, ``, 1),
		"checkpoint without":    strings.Replace(good, `"release"`, `"checkpoint"`, 1),
		"signature elsewhere":   strings.Replace(sign, `"event":"checkpoint"`, `"event":"start"`, 1),
		"short signature":       strings.Replace(sign, strings.Repeat("A", 86), strings.Repeat("A", 85), 1),
		"signature of 2 lines":  strings.Replace(sign, strings.Repeat("A", 86), strings.Repeat("A", 43)+`\n`+strings.Repeat("A", 43), 1),
		"loose signature":       strings.Replace(sign, strings.Repeat("A", 86), strings.Repeat("A", 85)+"B", 1),
		"realm":                 strings.Replace(sign, testRealm, testRealm+"00", 1),
		"too long":              strings.Replace(good, `"vm"`, `"`+strings.Repeat("v", MaxLine)+`"`, 1),
		"not an object":         `[1]`,
		"deep":                  strings.Repeat("[", 20000),
		"caller without a user": strings.Replace(good, `"caller":{"uid":0,`, `"caller":{`, 1),
	} {
		if line == good || line == sign {
			t.Fatalf("%s: nothing was changed", name)
		}
		if r, err := Parse([]byte(line)); !errors.Is(err, ErrRecord) || r != nil {
			t.Errorf("%s: %v, %v; want nil and ErrRecord", name, r, err)
		}
	}
}

// What a peer sends cannot keep its refusal out of the log, nor make a line that Parse does not read.
func TestHostileTextIsRecorded(t *testing.T) {
	l := openTest(t, newKeeper(t), nil)
	for name, rec := range map[string]Record{
		"long":       {Event: EventRefusal, Subject: strings.Repeat("ü", 50_000)},
		"bad UTF-8":  {Event: EventRefusal, Subject: "a\xff\xfe\"\n", Names: []string{"b\xff"}, Caller: &Caller{Unit: "/\xff"}},
		"everything": {Event: EventRefusal, Reason: strings.Repeat("\x01", 9000), Names: slicesOf(strings.Repeat("\x02", 9000), 64)},
		"line ends":  {Event: EventRefusal, Reason: "a\nb\r\u0085\u2028c"},
	} {
		if _, err := l.Append(rec, Written); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if rep := verify(t, l.cfg.Dir, VerifyOptions{}); !rep.OK() || rep.Events[EventRefusal] != 4 {
		t.Errorf("%+v", rep)
	}
	for name, rec := range map[string]Record{
		"no event":      {},
		"transcript":    {Event: EventRelease, Transcript: "xyz"},
		"policy":        {Event: EventRelease, Policy: strings.Repeat("A", 64)},
		"a checkpoint":  {Event: EventCheckpoint},
		"epochs":        {Event: EventRelease, Names: []string{"a"}, Epochs: []uint32{1, 2}},
		"far too large": {Event: EventRelease, Names: slicesOf("name", 20_000)},
	} {
		if h, err := l.Append(rec, Written); !errors.Is(err, ErrRecord) || h != (Head{}) {
			t.Errorf("%s: %v, %v; want ErrRecord", name, h, err)
		}
	}
}

func slicesOf(s string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = s
	}
	return out
}

// What Parse takes it takes in one spelling: encoding it gives the same octets. What it does not take gives nil.
func FuzzParse(f *testing.F) {
	f.Add(full().Encode(nil))
	f.Add(checkpoint().Encode(nil))
	f.Add((&Record{Event: EventStart}).Encode(nil))
	f.Add([]byte(`{"seq":1}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := Parse(line)
		if err != nil {
			if r != nil {
				t.Error("an error and a record")
			}
			return
		}
		if got := r.Encode(nil); !bytes.Equal(got, line) {
			t.Errorf("got  %q\nwant %q", got, line)
		}
		if bytes.IndexByte(line, '\n') >= 0 {
			t.Errorf("a line with a line's end in it: %q", line)
		}
	})
}

// Whatever texts come in, what is written can be read, and only the texts that cannot be kept are changed.
func FuzzEncode(f *testing.F) {
	f.Add("subject", "reason", uint64(1))
	f.Add("\xff\x00\n\"", "\\u0000\u2028", uint64(0))
	f.Fuzz(func(t *testing.T, subject, reason string, count uint64) {
		r := &Record{Seq: 1, Time: time.Unix(0, 0), Event: EventRefusal, Subject: subject, Reason: reason, Count: count, Caller: &Caller{Unit: subject}}
		r.bound(maxText)
		back, err := Parse(r.Encode(nil))
		if err != nil {
			t.Fatal(err)
		}
		if back.Subject != r.Subject || back.Reason != r.Reason || back.Count != count || back.Caller.Unit != r.Caller.Unit {
			t.Errorf("%+v became %+v", r, back)
		}
	})
}

func TestParseHead(t *testing.T) {
	h := Head{Seq: 18446744073709551615, Hash: Hash{0xab}}
	if got, err := ParseHead(h.String()); got != h || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", ":", "1", "1:", "01:" + h.Hash.String(), "+1:" + h.Hash.String(), "1:" + strings.ToUpper(h.Hash.String()),
		"1:" + h.Hash.String() + "00", "-1:" + h.Hash.String(), "18446744073709551616:" + h.Hash.String()} {
		if got, err := ParseHead(bad); err == nil || got != (Head{}) {
			t.Errorf("%q: %v", bad, got)
		}
	}
}
