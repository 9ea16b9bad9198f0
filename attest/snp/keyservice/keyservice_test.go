package keyservice_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/attest/snp/keyservice"
	"keybroker/attest/snp/snptest"
)

var day = time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC)

// A service is a local server of the key service's shape, with a test authority for Turin.
type service struct {
	*httptest.Server
	authority *snptest.Authority
	key       snp.Key // of which it has the certificate
	vcek      []byte

	mu     sync.Mutex
	asked  []string                                                 // the paths that were asked for
	answer func(w http.ResponseWriter, r *http.Request) (done bool) // in place of its own answer
}

var authority = sync.OnceValues(func() (*snptest.Authority, error) { return snptest.New(snp.Turin) })

// start starts a service.
func start(t testing.TB) *service {
	t.Helper()
	a, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	s := &service{authority: a}
	s.key = snp.Key{Kind: attest.VCEK, Line: snp.Turin, Chip: []byte("turinno1"), TCB: attest.TCB{FMC: 1, Bootloader: 2, TEE: 3, SNP: 4, Microcode: 5}}
	k, err := a.Issue(snptest.Template{Kind: attest.VCEK, HWID: s.key.Chip, TCB: s.key.TCB})
	if err != nil {
		t.Fatal(err)
	}
	s.vcek = k.DER
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

// ServeHTTP answers as AMD's does: DER, but chains in PEM.
func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, r.URL.RequestURI())
	answer := s.answer
	s.mu.Unlock()
	if answer != nil && answer(w, r) {
		return
	}
	switch r.URL.RequestURI() {
	case "/vcek/v1/Turin/747572696e6e6f31?fmcSPL=1&blSPL=2&teeSPL=3&snpSPL=4&ucodeSPL=5":
		w.Write(s.vcek)
	case "/vcek/v1/Turin/cert_chain":
		w.Write(chain(s.authority.ASK.Raw, s.authority.ARK.Raw))
	case "/vlek/v1/Turin/cert_chain":
		w.Write(chain(s.authority.ASVK.Raw, s.authority.ARK.Raw))
	case "/vcek/v1/Turin/crl", "/vlek/v1/Turin/crl":
		der, err := s.authority.CRL(day, day.AddDate(1, 0, 0))
		if err != nil {
			panic(err)
		}
		w.Write(der)
	default:
		http.NotFound(w, r)
	}
}

func chain(certs ...[]byte) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	return out
}

// requests returns how often the service was asked.
func (s *service) requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked)
}

// A clock is one that stands still but for who waits by it.
type clock struct {
	mu    sync.Mutex
	now   time.Time
	waits []time.Duration
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Wait(_ context.Context, d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.waits = c.now.Add(d), append(c.waits, d)
	return nil
}

// store returns a store in a folder that trusts the test authority.
func (s *service) store(t testing.TB, dir string) *endorsements.Store {
	t.Helper()
	root := s.authority.Root()
	root.Intermediates = nil
	if s.authority.ASK != nil {
		root.Intermediates = append(root.Intermediates, s.authority.ASK)
	}
	v, err := snp.New(snp.Config{Roots: []snp.Root{root}})
	if err != nil {
		t.Fatal(err)
	}
	st, err := endorsements.New(endorsements.Config{Dir: dir, Verifier: v})
	if err != nil {
		t.Fatal(err)
	}
	if err := endorsements.Make(dir); err != nil {
		t.Fatal(err)
	}
	return st
}

// client returns a client with its store, in a folder that others may have as well.
func (s *service) client(t testing.TB, dir string, c *clock) (*keyservice.Client, *endorsements.Store) {
	t.Helper()
	st := s.store(t, dir)
	client, err := keyservice.New(keyservice.Config{URL: s.URL, Store: st, Patience: time.Hour, Now: c.Now, Wait: c.Wait})
	if err != nil {
		t.Fatal(err)
	}
	return client, st
}

func stored(t testing.TB, s *endorsements.Store) []string {
	t.Helper()
	entries, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.Err != nil {
			t.Errorf("%s: %v", e.File, e.Err)
		}
		out = append(out, e.File)
	}
	return out
}

// All that the service has is got once, verified and stored, with ten seconds between the requests; with the server gone, reading
// goes on.
func TestGet(t *testing.T) {
	s, c := start(t), &clock{now: day}
	client, st := s.client(t, t.TempDir(), c)
	for _, get := range []func() ([]endorsements.Stored, error){
		func() ([]endorsements.Stored, error) { return client.VCEK(t.Context(), s.key) },
		func() ([]endorsements.Stored, error) { return client.Chain(t.Context(), snp.Turin, attest.VCEK) },
		func() ([]endorsements.Stored, error) { return client.Chain(t.Context(), snp.Turin, attest.VLEK) },
		func() ([]endorsements.Stored, error) { return client.CRL(t.Context(), snp.Turin, attest.VCEK) },
	} {
		if got, err := get(); err != nil || len(got) == 0 || !got[0].New {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if got, err := client.VCEK(t.Context(), s.key); err != nil || got != nil {
		t.Errorf("what is stored already: %+v, %v", got, err)
	}
	ten := 10 * time.Second
	if s.requests() != 4 || !slices.Equal(c.waits, []time.Duration{ten, ten, ten}) {
		t.Errorf("%d requests, waited %v", s.requests(), c.waits)
	}
	s.Close()
	names := stored(t, st)
	if len(names) != 5 || !strings.HasPrefix(names[3], "crl-Turin-") {
		t.Fatalf("%q", names)
	}
	want := []string{"ark-Turin-01.der", "ask-Turin-02.der", "asvk-Turin-03.der", "vcek/Turin-747572696e6e6f31-1-2-3-4-5.der"}
	if !slices.Equal(slices.Delete(names, 3, 4), want) {
		t.Errorf("%q", names)
	}
	if found, problems := st.Find(s.key); len(found.Certificates) != 2 || len(found.CRLs) != 1 || problems != nil {
		t.Errorf("%d certificates, %d lists, %v", len(found.Certificates), len(found.CRLs), problems)
	}
	c.now = c.now.Add(time.Minute)
	if _, err := client.CRL(t.Context(), snp.Turin, attest.VCEK); !errors.Is(err, keyservice.ErrUnavailable) {
		t.Errorf("with the server gone: %v", err)
	}
}

// Two that want the same at once make one request, also through stores and clients of their own.
func TestTwoAtOnce(t *testing.T) {
	s, c, dir := start(t), &clock{now: day}, t.TempDir()
	for what, get := range map[string]func(*keyservice.Client) ([]endorsements.Stored, error){
		"VCEK": func(c *keyservice.Client) ([]endorsements.Stored, error) { return c.VCEK(context.Background(), s.key) },
		"list": func(c *keyservice.Client) ([]endorsements.Stored, error) {
			return c.CRL(context.Background(), snp.Turin, attest.VCEK)
		},
	} {
		before := s.requests()
		entered, leave := make(chan struct{}), make(chan struct{})
		s.mu.Lock()
		s.answer = func(http.ResponseWriter, *http.Request) bool {
			select {
			case entered <- struct{}{}:
				<-leave
			case <-leave: // one request too many
			}
			return false
		}
		s.mu.Unlock()
		var group sync.WaitGroup
		ask := func(waiting func(string)) {
			client, err := keyservice.New(keyservice.Config{URL: s.URL, Store: s.store(t, dir), Patience: time.Hour, Now: c.Now, Wait: c.Wait, Progress: waiting})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := get(client); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		group.Go(func() { ask(nil) })
		<-entered // the first is at the service
		others := make(chan string, 3)
		for range 3 {
			group.Go(func() { ask(func(text string) { others <- text }) })
		}
		for range 3 {
			<-others // each says that it waits
		}
		close(leave)
		group.Wait()
		if n := s.requests() - before; n != 1 {
			t.Errorf("%s: %d requests", what, n)
		}
	}
}

// 429 and 503 with Retry-After, in seconds and as a date: it is waited for, and by the next process too.
func TestRetryAfter(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		header string
		want   time.Duration
	}{
		"seconds":      {http.StatusTooManyRequests, "42", 42 * time.Second},
		"few seconds":  {http.StatusTooManyRequests, "1", 10 * time.Second},
		"none":         {http.StatusTooManyRequests, "", 10 * time.Second},
		"nonsense":     {http.StatusServiceUnavailable, "soon", 10 * time.Second},
		"a date":       {http.StatusServiceUnavailable, day.Add(90 * time.Second).Format(http.TimeFormat), 90 * time.Second},
		"a past date":  {http.StatusServiceUnavailable, day.Add(-time.Hour).Format(http.TimeFormat), 10 * time.Second},
		"an hour more": {http.StatusTooManyRequests, "3601", 0},
		"centuries":    {http.StatusTooManyRequests, "4294967295", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s, clock, dir := start(t), &clock{now: day}, t.TempDir()
			s.answer = func(w http.ResponseWriter, _ *http.Request) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				if len(s.asked) > 1 {
					return false
				}
				if c.header != "" {
					w.Header().Set("Retry-After", c.header)
				}
				w.WriteHeader(c.status)
				return true
			}
			client, _ := s.client(t, dir, clock)
			_, err := client.VCEK(t.Context(), s.key)
			if c.want > 0 {
				if err != nil || s.requests() != 2 || !slices.Equal(clock.waits, []time.Duration{c.want}) {
					t.Errorf("%v, %d requests, waited %v", err, s.requests(), clock.waits)
				}
				return
			}
			if !errors.Is(err, keyservice.ErrUnavailable) || len(clock.waits) > 0 || s.requests() != 1 {
				t.Errorf("%v, %d requests, waited %v", err, s.requests(), clock.waits)
			}
			next, _ := s.client(t, dir, clock)
			if _, err := next.VCEK(t.Context(), s.key); !errors.Is(err, keyservice.ErrUnavailable) || s.requests() != 1 {
				t.Errorf("the next process: %v, %d requests", err, s.requests())
			}
			clock.now = clock.now.Add(24 * time.Hour)
			if _, err := next.VCEK(t.Context(), s.key); err != nil {
				t.Errorf("a day later: %v", err)
			}
		})
	}
}

// A service that always asks to wait is asked five times, not for ever.
func TestGivesUp(t *testing.T) {
	s, c := start(t), &clock{now: day}
	s.answer = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	client, _ := s.client(t, t.TempDir(), c)
	if _, err := client.VCEK(t.Context(), s.key); !errors.Is(err, keyservice.ErrUnavailable) || s.requests() != 5 {
		t.Errorf("%v, %d requests", err, s.requests())
	}
}

// Other answers than what was asked for are refused, and nothing of them is stored.
func TestWrongAnswers(t *testing.T) {
	forger, err := snptest.New(snp.Turin)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t)
	forged, err := forger.Issue(snptest.Template{Kind: attest.VCEK, HWID: s.key.Chip, TCB: s.key.TCB})
	if err != nil {
		t.Fatal(err)
	}
	otherTCB := s.key.TCB
	otherTCB.FMC++
	others, err := s.authority.Issue(snptest.Template{Kind: attest.VCEK, HWID: s.key.Chip, TCB: otherTCB})
	if err != nil {
		t.Fatal(err)
	}
	octets := func(b []byte) http.HandlerFunc { return func(w http.ResponseWriter, _ *http.Request) { w.Write(b) } }
	status := func(n int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", s.URL+"/elsewhere")
			w.WriteHeader(n)
			w.Write(s.vcek)
		}
	}
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{
		"nothing":            {octets(nil), keyservice.ErrAnswer},
		"text":               {octets([]byte("<html>")), keyservice.ErrAnswer},
		"cut":                {octets(s.vcek[:900]), keyservice.ErrAnswer},
		"another TCB's":      {octets(others.DER), keyservice.ErrAnswer},
		"forged":             {octets(forged.DER), keyservice.ErrAnswer},
		"forged, with chain": {octets(chain(forged.DER, forger.ASK.Raw, forger.ARK.Raw)), keyservice.ErrAnswer},
		"an issuer":          {octets(s.authority.ASK.Raw), keyservice.ErrAnswer},
		"it and another":     {octets(chain(s.vcek, others.DER)), keyservice.ErrAnswer},
		"too much":           {octets(append(bytes.Clone(s.vcek), make([]byte, 1<<20)...)), keyservice.ErrAnswer},
		"without end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}, keyservice.ErrAnswer},
		"redirect":   {status(http.StatusFound), keyservice.ErrAnswer},
		"no content": {status(http.StatusNoContent), keyservice.ErrAnswer},
		"not found":  {status(http.StatusNotFound), keyservice.ErrNone},
		"forbidden":  {status(http.StatusForbidden), keyservice.ErrNone},
		"broken":     {status(http.StatusInternalServerError), keyservice.ErrUnavailable},
		"hangs up":   {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, keyservice.ErrUnavailable},
		"half a body": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "2000")
			w.Write(s.vcek[:700])
		}, keyservice.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			s.mu.Lock()
			s.asked = nil
			s.answer = func(w http.ResponseWriter, r *http.Request) bool { c.answer(w, r); return true }
			s.mu.Unlock()
			client, st := s.client(t, t.TempDir(), &clock{now: day})
			got, err := client.VCEK(t.Context(), s.key)
			if names := stored(t, st); !errors.Is(err, c.want) || got != nil || len(names) > 0 || s.requests() != 1 {
				t.Errorf("%v, %d requests, stored %q", err, s.requests(), names)
			}
		})
	}
	s.answer = func(w http.ResponseWriter, _ *http.Request) bool { w.Write(chain(s.authority.ARK.Raw)); return true }
	client, st := s.client(t, t.TempDir(), &clock{now: day})
	if _, err := client.Chain(t.Context(), snp.Turin, attest.VCEK); !errors.Is(err, keyservice.ErrAnswer) || len(stored(t, st)) > 0 {
		t.Errorf("a chain without ASK: %v", err)
	}
	if _, err := client.CRL(t.Context(), snp.Turin, attest.VCEK); !errors.Is(err, keyservice.ErrAnswer) || len(stored(t, st)) > 0 {
		t.Errorf("a chain for a list: %v", err)
	}
}

// A stored file that was altered is got again.
func TestAlteredIsGotAgain(t *testing.T) {
	s, c := start(t), &clock{now: day}
	client, st := s.client(t, t.TempDir(), c)
	got, err := client.VCEK(t.Context(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(st.Dir(), got[0].File), 100); err != nil {
		t.Fatal(err)
	}
	if got, err := client.VCEK(t.Context(), s.key); err != nil || len(got) != 1 || !got[0].New || s.requests() != 2 {
		t.Errorf("%+v, %v, %d requests", got, err, s.requests())
	}
	stored(t, st)
}

// The note is read by who never wrote it: nonsense, and times of a clock that was set back, cost ten seconds and no more.
func TestNote(t *testing.T) {
	for name, content := range map[string]string{
		"nonsense": "{", "unknown": `{"more":1}`, "far away": fmt.Sprintf(`{"service":"","next":%q,"got":{}}`, day.AddDate(20, 0, 0).Format(time.RFC3339)),
	} {
		s, c, dir := start(t), &clock{now: day}, t.TempDir()
		client, _ := s.client(t, dir, c)
		if _, err := client.CRL(t.Context(), snp.Turin, attest.VCEK); err != nil {
			t.Fatal(err)
		}
		notes, err := filepath.Glob(filepath.Join(dir, ".keyservice-*.json"))
		if err != nil || len(notes) != 1 {
			t.Fatalf("%q, %v", notes, err)
		}
		if err := os.WriteFile(notes[0], []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := client.VCEK(t.Context(), s.key); err != nil || !slices.Equal(c.waits, []time.Duration{10 * time.Second}) {
			t.Errorf("%s: %v, waited %v", name, err, c.waits)
		}
	}
}

// Who may not wait is told from when on the service may be asked.
func TestNoPatience(t *testing.T) {
	s, c := start(t), &clock{now: day}
	st := s.store(t, t.TempDir())
	client, err := keyservice.New(keyservice.Config{URL: s.URL + "/", Store: st, Now: c.Now, Wait: c.Wait})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CRL(t.Context(), snp.Turin, attest.VCEK); err != nil {
		t.Fatal(err)
	}
	if _, err := client.VCEK(t.Context(), s.key); !errors.Is(err, keyservice.ErrUnavailable) || !strings.Contains(err.Error(), "2026-04-01T00:00:10Z") {
		t.Errorf("%v", err)
	}
}

func TestConfig(t *testing.T) {
	s := start(t)
	for _, url := range []string{"kdsintf.amd.com", "ftp://a", "https://", "https://u:p@a", "https://a?b=c", "https://a#b", "file:///etc", "https:a"} {
		if _, err := keyservice.New(keyservice.Config{URL: url, Store: s.store(t, t.TempDir())}); err == nil {
			t.Errorf("%s is taken", url)
		}
	}
	if _, err := keyservice.New(keyservice.Config{}); err == nil {
		t.Error("no store")
	}
	client, _ := s.client(t, t.TempDir(), &clock{now: day})
	for _, k := range []snp.Key{{}, {Kind: attest.VLEK, Line: snp.Turin}, {Kind: attest.VCEK, Line: snp.Turin, Chip: make([]byte, 64)}} {
		if _, err := client.VCEK(t.Context(), k); err == nil || s.requests() > 0 {
			t.Errorf("%+v: %v, %d requests", k, err, s.requests())
		}
	}
}

// Over TLS with a certificate that nobody trusts nothing is got.
func TestTLS(t *testing.T) {
	s := start(t)
	secure := httptest.NewUnstartedServer(s)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	client, err := keyservice.New(keyservice.Config{URL: secure.URL, Store: s.store(t, t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.VCEK(t.Context(), s.key); !errors.Is(err, keyservice.ErrUnavailable) || s.requests() > 0 {
		t.Errorf("%v, %d requests", err, s.requests())
	}
	client, err = keyservice.New(keyservice.Config{URL: secure.URL, Store: s.store(t, t.TempDir()), Transport: secure.Client().Transport})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.VCEK(t.Context(), s.key); err != nil {
		t.Error(err)
	}
}
