package daemon

import (
	"errors"
	"net/http/httptest"
	"testing"

	"keybroker/inject"
	"keybroker/internal/policy"
)

// What a browser, a proxy or a rebound name would send is refused, over TCP and over the Unix socket alike.
func TestHeaders(t *testing.T) {
	for _, c := range []struct {
		name, via, host string
		headers         map[string]string
		ok              bool
	}{
		{"plain", policy.ViaTCP, "127.0.0.1:7209", nil, true},
		{"IPv6", policy.ViaTCP, "[::1]:7209", nil, true},
		{"name", policy.ViaTCP, "localhost:7209", nil, true},
		{"another address of loopback", policy.ViaTCP, "127.0.0.2:7209", nil, false},
		{"rebound name", policy.ViaTCP, "evil.example:7209", nil, false},
		{"no port", policy.ViaTCP, "127.0.0.1", nil, false},
		{"no header of ours", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Keybroker": ""}, false},
		{"another version", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Keybroker": "2"}, false},
		{"origin", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Origin": "null"}, false},
		{"referer", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Referer": "x"}, false},
		{"fetch metadata", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Sec-Fetch-Site": "none"}, false},
		{"forwarded for", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"X-Forwarded-For": "x"}, false},
		{"forwarded", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Forwarded": "x"}, false},
		{"via", policy.ViaTCP, "127.0.0.1:7209", map[string]string{"Via": "x"}, false},
		{"Unix socket", policy.ViaUnix, "whatever", nil, true},
		{"proxy to the Unix socket", policy.ViaUnix, "whatever", map[string]string{"Via": "x"}, false},
	} {
		r := httptest.NewRequest("GET", "http://127.0.0.1:7209/v1/keys/db", nil)
		r.Host = c.host
		r.Header.Set("Keybroker", "1")
		for h, v := range c.headers {
			r.Header.Set(h, v)
		}
		err := checkHeaders(r, c.via)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && !errors.Is(err, inject.Refusal{Code: inject.CodeMalformed}) {
			t.Errorf("%s: %v, expected a refusal with a code", c.name, err)
		}
	}
}

func TestEpochQuery(t *testing.T) {
	for query, want := range map[string]uint32{"": 0, "epoch=1": 1, "epoch=4294967295": 1<<32 - 1} {
		if got, err := wantedEpoch(query); got != want || err != nil {
			t.Errorf("%q: %d, %v", query, got, err)
		}
	}
	for _, query := range []string{"epoch=0", "epoch=4294967296", "epoch=-1", "epoch=1&epoch=2", "x=1", "epoch", "1", "epoch="} {
		if got, err := wantedEpoch(query); !errors.Is(err, inject.Refusal{Code: inject.CodeMalformed}) {
			t.Errorf("%q: %d, %v", query, got, err)
		}
	}
	e := epochRecord{Current: 3, Retired: 1, Generation: 1}
	for want, code := range map[uint32]inject.Code{0: "", 3: "", 2: "", 1: inject.CodeRetiredEpoch, 4: inject.CodeUnknownEpoch} {
		got, err := e.pick(want)
		if code == "" && (err != nil || (want != 0 && got != want) || (want == 0 && got != 3)) {
			t.Errorf("epoch %d: %d, %v", want, got, err)
		}
		if code != "" && !errors.Is(err, inject.Refusal{Code: code}) {
			t.Errorf("epoch %d: %v, expected %s", want, err, code)
		}
	}
	if !(epochRecord{Current: 2, Opened: 1}).mayCreate(2) || (epochRecord{Current: 2, Opened: 2}).mayCreate(2) || (epochRecord{Current: 2, Opened: 0}).mayCreate(1) {
		t.Error("a volume may be formatted with the current epoch until its first acknowledgement, and never else")
	}
}
