package inject

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// raw sends one request on conn and returns status and refusal code.
func raw(t *testing.T, conn net.Conn, method, path, body string) (int, Code) {
	t.Helper()
	in := bufio.NewReader(conn)
	go fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", method, path, len(body), body)
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	answer, _ := io.ReadAll(response.Body)
	var r Refusal
	parse(answer, &r)
	return response.StatusCode, r.Code
}

func TestHostileRequests(t *testing.T) {
	i := newIssuer(t, 1)
	const secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		code                     Code
	}{
		{"empty", "POST", "/v1/challenge", "", 400, CodeMalformed},
		{"unknown field", "POST", "/v1/challenge", `{"tier":"vm","subject":"","more":1}`, 400, CodeMalformed},
		{"repeated field", "POST", "/v1/challenge", `{"tier":"vm","tier":"vm","subject":""}`, 400, CodeMalformed},
		{"mis-cased field", "POST", "/v1/challenge", `{"Tier":"vm","subject":""}`, 400, CodeMalformed},
		{"wrong type", "POST", "/v1/challenge", `{"tier":7,"subject":""}`, 400, CodeMalformed},
		{"bad UTF-8", "POST", "/v1/challenge", "{\"tier\":\"vm\",\"subject\":\"\xff\"}", 400, CodeMalformed},
		{"trailing octets", "POST", "/v1/challenge", `{"tier":"vm","subject":""}{}`, 400, CodeMalformed},
		{"other tier", "POST", "/v1/challenge", `{"tier":"snp","subject":""}`, 403, CodeWrongTier},
		{"no UUID", "POST", "/v1/challenge", `{"tier":"vm","subject":"../../etc"}`, 400, CodeMalformed},
		{"secret in the wrong slot", "POST", "/v1/release", `{"nonce":"` + secret + `!"}`, 400, CodeMalformed},
		{"release without a challenge", "POST", "/v1/release", `{}`, 400, CodeWrongIssuer},
		{"ack without a release", "POST", "/v1/ack", `{"body":"","mac":""}`, 400, CodeMalformed},
		{"64 KiB and one", "POST", "/v1/release", strings.Repeat(" ", MaxBody+1), 413, CodeTooLarge},
		{"a route of another listener", "GET", "/v1/keys/db", "", 404, ""},
		{"wrong method", "GET", "/v1/release", "", 405, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, code := raw(t, i.connect(t), c.method, c.path, c.body)
			if status != c.status || code != c.code {
				t.Errorf("status %d, code %q; expected %d, %q", status, code, c.status, c.code)
			}
		})
	}
	if len(i.claims) != 0 {
		t.Errorf("%d requests came as far as a decision", len(i.claims))
	}
}

// A parse error never shows what it was given, which may be a key.
func TestParseErrorsEchoNothing(t *testing.T) {
	const secret = "SECRETsecretSECRET"
	for _, text := range []string{
		`{"` + secret + `":1}`, `{"tier":["` + secret + `"]}`, `{"tier":"vm" ` + secret, secret, `{"nonce":"` + secret + `%%"}`,
		`{"want":[{"name":{"` + secret + `":1}}]}`,
	} {
		var r releaseRequest
		if err := parse([]byte(text), &r); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("parse(%s): %v", text, err)
		}
	}
}

// A decision that panics is a refusal, and the next request is served.
func TestPanicIsARefusal(t *testing.T) {
	i := newIssuer(t, 1)
	i.door.Decide = func(context.Context, *Claim) (*Grant, error) { panic("whatever a guest sends") }
	s := newReceiver(t, i.Identity).on(t, i.connect(t))
	ctx := testContext(t)
	for range 2 {
		c, err := s.Challenge(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Release(ctx, c, []Want{{Name: "disk"}}); !errors.Is(err, Refusal{Code: CodeInternal}) {
			t.Fatalf("after a panic: %v, expected %s", err, CodeInternal)
		}
	}
}

// A refusal keeps its identity over the network, its cause stays behind, and what it shows cannot move a cursor.
func TestRefusalTravels(t *testing.T) {
	i := newIssuer(t, 1)
	i.door.Decide = func(context.Context, *Claim) (*Grant, error) {
		return nil, fmt.Errorf("deciding: %w", Refusal{Code: CodeNoPolicy, Reason: "no entry\x1b[2J", Next: "add one", Cause: errors.New("INTERNAL")})
	}
	s := newReceiver(t, i.Identity).on(t, i.connect(t))
	ctx := testContext(t)
	c, err := s.Challenge(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Release(ctx, c, []Want{{Name: "disk"}})
	if !errors.Is(err, Refusal{Code: CodeNoPolicy}) || strings.Contains(err.Error(), "INTERNAL") || strings.ContainsRune(err.Error(), 0x1b) {
		t.Errorf("got %q", err)
	}
}

func TestCheckWant(t *testing.T) {
	many := make([]Want, MaxWant+1)
	for n := range many {
		many[n].Name = fmt.Sprintf("k%03d", n)
	}
	for name, want := range map[string][]Want{
		"none": nil, "too many": many, "unsorted": {{Name: "b"}, {Name: "a"}}, "twice": {{Name: "a"}, {Name: "a"}},
		"no name": {{}}, "upper case": {{Name: "Disk"}}, "slash": {{Name: "a/b"}}, "long": {{Name: strings.Repeat("a", 64)}},
	} {
		if checkWant(want) == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := checkWant(many[:MaxWant]); err != nil {
		t.Errorf("%d keys: %v", MaxWant, err)
	}
}

// One text for the same octets, and no other: Go's own decoder skips the ends of lines.
func TestOctetsHaveOneEncoding(t *testing.T) {
	for text, ok := range map[string]bool{"": true, "AAAA": true, "_-8": true, "AA\nAA": false, "AAAA\n": false, "\r": false, "AA\r\nAA": false,
		"AAA=": false, "AAB": false, "A": false, "+/8": false, "AA AA": false} {
		var o Octets
		if err := o.UnmarshalText([]byte(text)); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
	pin := PinOf(newIssuer(t, 1).Identity)
	if got, err := ParsePin(pin.String()); err != nil || got != pin {
		t.Errorf("%v: %v", pin, err)
	}
	for _, text := range []string{pin.String() + "\n", pin.String()[:20] + "\r\n" + pin.String()[20:], "ed25519:\n" + pin.String()[8:], pin.String() + "="} {
		if _, err := ParsePin(text); err == nil {
			t.Errorf("%q is taken for a pin", text)
		}
	}
}

// What is read is what would be written.
func FuzzOctets(f *testing.F) {
	f.Add([]byte("AAAA"))
	f.Add([]byte("AA\nAA"))
	f.Add([]byte("_-8"))
	f.Fuzz(func(t *testing.T, text []byte) {
		o := Octets("before")
		if err := o.UnmarshalText(text); err != nil {
			if string(o) != "before" {
				t.Fatal("an error that changes what was there")
			}
			return
		}
		if again, err := o.MarshalText(); err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q is read as %x, which is written %q, %v", text, []byte(o), again, err)
		}
		if p, err := ParsePin(pinPrefix + string(text)); err == nil && p.String() != pinPrefix+string(text) {
			t.Fatalf("%q is read as the pin %s", text, p)
		}
	})
}

// Whatever parses as a release encodes to octets that parse to the same; an error leaves no claim.
func FuzzRelease(f *testing.F) {
	f.Add([]byte(`{"issuer":"AAAA","tier":"vm","kind":"none","subject":"x","nonce":"","pk":"","want":[{"name":"disk","epoch":0}],"evidence":""}`))
	f.Add([]byte(`{"want":[{"name":"a"},{"name":"a"}]}`))
	f.Add([]byte(`{"TIER":"vm"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r releaseRequest
		if err := parse(data, &r); err != nil {
			if !utf8.ValidString(err.Error()) {
				t.Fatal("an error that is not text")
			}
			return
		}
		again := marshal(r)
		var second releaseRequest
		if err := parse(again, &second); err != nil {
			t.Fatalf("what was parsed does not parse again: %v", err)
		}
		if !bytes.Equal(marshal(second), again) {
			t.Fatal("parsing is not stable")
		}
		if checkWant(r.Want) == nil {
			for n := 1; n < len(r.Want); n++ {
				if compareWant(r.Want[n-1], r.Want[n]) >= 0 {
					t.Fatal("an unsorted or repeated want was taken")
				}
			}
		}
	})
}

// Whatever an issuer answers, a receiver says so in bounded printable text.
func FuzzRefusal(f *testing.F) {
	f.Add(403, []byte(`{"code":"no-policy","reason":"x"}`))
	f.Add(500, []byte("\x1b[2J"))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		err := answerError(status, body)
		if err == nil {
			if status != http.StatusOK && status != http.StatusNoContent {
				t.Fatal("a refusal taken for an answer")
			}
			return
		}
		if s := err.Error(); len(s) > 4096 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
			t.Fatalf("shown: %q", s)
		}
	})
}

// A receiver that has all its keys keeps its connection for hints, longer than any request may take to arrive.
func TestWaitOutlivesTheReadTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 1)
		hints := make(chan struct{}, 1)
		i.door.Hints = hints
		theirs, ours := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- i.Serve(t.Context(), theirs, i.door) }()
		s := newReceiver(t, i.Identity).on(t, ours)
		began := time.Now()
		if hinted, err := s.Wait(t.Context()); hinted || err != nil {
			t.Fatalf("without a hint: %v, %v", hinted, err)
		}
		if waited := time.Since(began); waited != hintTimeout {
			t.Errorf("waited %v, expected %v", waited, hintTimeout)
		}
		hints <- struct{}{}
		if hinted, err := s.Wait(t.Context()); !hinted || err != nil {
			t.Errorf("with a hint: %v, %v", hinted, err)
		}
		if _, err := s.Challenge(t.Context()); err != nil {
			t.Errorf("after that on the same connection: %v", err)
		}
		ours.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// A nonce is good for a minute and no longer.
func TestNonceExpires(t *testing.T) {
	for _, c := range []struct {
		age  time.Duration
		want error
	}{
		{nonceLife, nil},
		{nonceLife + 1, Refusal{Code: CodeExpiredNonce}},
	} {
		synctest.Test(t, func(t *testing.T) {
			i := newIssuer(t, 1)
			s := newReceiver(t, i.Identity).on(t, i.connect(t))
			challenge, err := s.Challenge(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(c.age) // of the test's own clock
			if _, err := s.Release(t.Context(), challenge, []Want{{Name: "disk"}}); !errors.Is(err, c.want) {
				t.Errorf("after %v: %v, expected %v", c.age, err, c.want)
			}
			if _, err := s.Challenge(t.Context()); err != nil {
				t.Errorf("another challenge: %v", err)
			}
		})
	}
}

// Whatever a receiver does or leaves, a session ends within its grace once the broker wants it to: an idle one at once.
func TestServeEnds(t *testing.T) {
	for name, c := range map[string]struct {
		say    string
		within time.Duration
	}{
		"nothing was said":  {"", 0},
		"idle":              {"POST /v1/challenge HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{\"tier\":\"vm\",\"subject\":\"\"}", 0},
		"waiting for hints": {"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n", 0},
		"half a body":       {"POST /v1/challenge HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", 2 * lateTime},
		"half a header":     {"POST /v1/chal", 2 * lateTime},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := newIssuer(t, 1)
				theirs, ours := net.Pipe()
				defer ours.Close()
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- i.Serve(ctx, theirs, i.door) }()
				go io.Copy(io.Discard, ours)
				ours.Write([]byte(c.say))
				synctest.Wait()
				began := time.Now()
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > c.within+time.Second {
					t.Errorf("ended after %v, expected %v", took, c.within)
				}
			})
		})
	}
	t.Run("ended before it began", func(t *testing.T) {
		i := newIssuer(t, 1)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 200 {
			theirs, ours := net.Pipe()
			if err := i.Serve(ctx, theirs, i.door); err != nil {
				t.Fatal(err)
			}
			if _, err := ours.Read(make([]byte, 1)); err == nil {
				t.Fatal("the connection is open still")
			}
		}
	})
}

// What is being decided when a session is to end is still answered, however long that takes within the grace.
func TestServeEndsAfterADecision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 1)
		decide := i.door.Decide
		deciding := make(chan struct{})
		i.door.Decide = func(ctx context.Context, c *Claim) (*Grant, error) {
			close(deciding)
			time.Sleep(writeTimeout / 2)
			return decide(ctx, c)
		}
		theirs, ours := net.Pipe()
		defer ours.Close()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- i.Serve(ctx, theirs, i.door) }()
		go func() {
			<-deciding
			cancel()
		}()
		s := newReceiver(t, i.Identity).on(t, ours)
		c, err := s.Challenge(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Release(t.Context(), c, []Want{{Name: "disk"}}); err != nil {
			t.Errorf("a decision that the end met: %v", err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// An answer that nobody takes holds up the end no longer than a request that nobody finishes.
func TestServeEndsWithoutAReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t, 1)
		theirs, ours := net.Pipe()
		defer ours.Close()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- i.Serve(ctx, theirs, i.door) }()
		io.WriteString(ours, "POST /v1/challenge HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{\"tier\":\"vm\",\"subject\":\"\"}")
		synctest.Wait()
		began := time.Now()
		cancel()
		<-done
		if took := time.Since(began); took > 2*lateTime+time.Second {
			t.Errorf("ended after %v", took)
		}
	})
}

// What a stranger calls his evidence is shown to people: it is a short name, or the request is refused before anything is shown.
func TestKindIsAName(t *testing.T) {
	i := newIssuer(t, 1)
	s := newReceiver(t, i.Identity).on(t, i.connect(t))
	pk := s.receiver.Key.secret.PublicKey().Bytes()
	for _, kind := range []string{"", "Kind", "a\nb", strings.Repeat("a", 33)} {
		c, err := s.Challenge(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.post(testContext(t), "/v1/release", marshal(releaseRequest{
			Issuer: c.Issuer, Tier: TierVM, Kind: kind, Subject: c.Subject, Nonce: c.Nonce, PK: pk, Want: []Want{{Name: "disk"}},
		}))
		if !errors.Is(err, Refusal{Code: CodeMalformed}) {
			t.Errorf("kind %.40q: %v, expected %s", kind, err, CodeMalformed)
		}
	}
	if len(i.claims) != 0 {
		t.Errorf("%d requests came as far as a decision", len(i.claims))
	}
}
