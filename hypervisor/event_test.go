package hypervisor

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var testEvent = HookEvent{
	Operation: OpStarted, Suboperation: "begin", Extra: "-", UUID: testUUID, Name: "web1", CID: 42,
	Offered: []string{"disk", "app"}, PID: 4711, At: 123456789,
}

func TestHookEvent(t *testing.T) {
	data, err := testEvent.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseHookEvent(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testEvent, back); diff != "" {
		t.Error(diff)
	}
	want := Domain{UUID: testUUID, Name: "web1", CID: 42, Offered: []string{"disk", "app"}, Metadata: true, Running: true, PID: 4711}
	if diff := cmp.Diff(want, back.Domain()); diff != "" {
		t.Error(diff)
	}
}

// The longest that a domain may say fits into an event.
func TestHookEventLongest(t *testing.T) {
	e := testEvent
	e.Offered = nil
	for i := range MaxOffered {
		e.Offered = append(e.Offered, strings.Repeat("k", maxKeyName-2)+string(rune('a'+i/26))+string(rune('a'+i%26)))
	}
	e.Name, e.Extra = strings.Repeat("\"", MaxNameLen), strings.Repeat("\x01", maxExtra)
	if _, err := e.Marshal(); err != nil {
		t.Error(err)
	}
}

var badEvents = map[string]string{
	"empty":              ``,
	"not an object":      `[]`,
	"an unknown field":   `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","sink":"luks"}`,
	"a repeated field":   `{"operation":"start","operation":"stopped","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w"}`,
	"another case":       `{"Operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w"}`,
	"a wrong type":       `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","cid":"42"}`,
	"bad UTF-8":          `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"` + "\xff" + `"}`,
	"two of them":        `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w"}{}`,
	"unknown operation":  `{"operation":"destroy","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w"}`,
	"no UUID":            `{"operation":"start","suboperation":"begin","extra":"-","name":"w"}`,
	"UUID in upper case": `{"operation":"start","suboperation":"begin","extra":"-","uuid":"AAAAAAAA-2222-3333-4444-555555555555","name":"w"}`,
	"no name":            `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":""}`,
	"the host's CID":     `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","cid":2}`,
	"a negative process": `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","pid":-1}`,
	"a huge process":     `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","pid":4194305}`,
	"a negative time":    `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","at":-1}`,
	"a bad key name":     `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","offered":["A"]}`,
	"a key twice":        `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","offered":["a","a"]}`,
	"an unknown tier":    `{"operation":"start","suboperation":"begin","extra":"-","uuid":"` + testUUID + `","name":"w","tier":"host"}`,
	"a long extra":       `{"operation":"start","suboperation":"begin","extra":"` + strings.Repeat("x", 257) + `","uuid":"` + testUUID + `","name":"w"}`,
	"too large":          `{"operation":"` + strings.Repeat("x", MaxHookEvent) + `"}`,
}

func TestParseHookEventRefuses(t *testing.T) {
	for title, data := range badEvents {
		e, err := ParseHookEvent([]byte(data))
		if err == nil {
			t.Errorf("%s: taken", title)
		}
		if diff := cmp.Diff(HookEvent{}, e); diff != "" {
			t.Errorf("%s: an error and an event: %s", title, diff)
		}
	}
}

func TestHookEventLate(t *testing.T) {
	e := HookEvent{At: int64(time.Minute)}
	for now, want := range map[time.Duration]bool{time.Minute: false, time.Minute + HookLife: false, time.Minute + HookLife + 1: true, 0: false} {
		if got := e.Late(now); got != want {
			t.Errorf("late at %v: %v", now, got)
		}
	}
	if (HookEvent{}).Late(time.Hour) {
		t.Error("an event without a time is late")
	}
}

// FuzzParseHookEvent: what is taken is written out and read the same; an error leaves nothing.
func FuzzParseHookEvent(f *testing.F) {
	good, err := testEvent.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, data := range badEvents {
		f.Add([]byte(data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := ParseHookEvent(data)
		if err != nil {
			if diff := cmp.Diff(HookEvent{}, e); diff != "" {
				t.Fatalf("an error and an event: %s", diff)
			}
			return
		}
		again, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseHookEvent(again)
		if err != nil {
			t.Fatal(err)
		}
		if len(e.Offered) == 0 { // null and [] are both no names
			e.Offered = nil
		}
		if diff := cmp.Diff(e, back); diff != "" {
			t.Fatal(diff)
		}
	})
}
