package derive

import (
	"bytes"
	"errors"
	"testing"

	"keybroker/internal/tuple"
)

func testKeyring(t testing.TB) *keyring {
	t.Helper()
	k, err := newKeyring(filledPage(t, testMaster(t, 0), testMaster(t, 1)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func deriveRequest(generation uint32, length int, info []byte) request {
	return request{op: opDerive, generation: generation, length: length, info: info}
}

// Requests of which nobody gets an answer but a refusal.
func refusedRequests() map[string]request {
	sign := func(fields ...[]byte) request { return request{op: opSign, message: tuple.Encode(fields...)} }
	return map[string]request{
		"identity seed":      deriveRequest(1, 32, IdentityInfo(1)),
		"next identity seed": deriveRequest(1, 64, IdentityInfo(2)),
		"realm id":           deriveRequest(1, 32, RealmIDInfo()),
		"no info":            deriveRequest(1, 32, nil),
		"length 16":          deriveRequest(1, 16, []byte("a")),
		"length 96":          deriveRequest(1, 96, []byte("a")),
		"length 2^31":        deriveRequest(1, 1<<31-1, []byte("a")),
		"info of 1 KiB":      deriveRequest(1, 32, bytes.Repeat([]byte("a"), maxInfo)),
		"generation 0":       deriveRequest(0, 32, []byte("a")),
		"generation 3":       deriveRequest(3, 32, []byte("a")),
		"generation 2^32-1":  deriveRequest(1<<32-1, 32, []byte("a")),
		"session label":      sign([]byte("keybroker/v1 session"), []byte("x")),
		"slot label":         sign([]byte("keybroker/v1 slot")),
		"no label":           sign(),
		"no tuple":           {op: opSign, message: []byte("sign this")},
		"label, then none":   {op: opSign, message: append(tuple.Encode([]byte(LabelAudit)), "more"...)},
		"message too long":   sign([]byte(LabelAudit), make([]byte, maxMessage)),
	}
}

func TestRefusals(t *testing.T) {
	k := testKeyring(t)
	for name, r := range refusedRequests() {
		answers, rest, err := k.answerAll(nil, r.appendFrame(nil))
		if err != nil || len(rest) != 0 || len(answers) != 5 {
			t.Errorf("%s: answered %x, %v", name, answers, err)
			continue
		}
		if s := answers[4]; s != statusRefused && s != statusGeneration {
			t.Errorf("%s: status %d", name, s)
		}
	}
}

var malformed = map[string][]byte{
	"length 0":             {0, 0, 0, 0},
	"length 2^32-1":        {255, 255, 255, 255, 1},
	"one too long":         tuple.Uint32(maxRequest + 1),
	"unknown operation":    {0, 0, 0, 1, 9},
	"operation 0":          {0, 0, 0, 1, 0},
	"hello with arguments": {0, 0, 0, 2, opHello, 1},
	"derive without":       {0, 0, 0, 1, opDerive},
	"derive, cut":          {0, 0, 0, 8, opDerive, 0, 0, 0, 1, 0, 0, 0},
	"info over 1 KiB":      deriveRequest(1, 32, bytes.Repeat([]byte("a"), maxInfo+1)).appendFrame(nil),
	"HTTP":                 []byte("GET / HTTP/1.1\r\n\r\n"),
}

// A malformed request is answered as such, and nothing after it is answered at all.
func TestMalformed(t *testing.T) {
	k := testKeyring(t)
	hello := request{op: opHello}.appendFrame(nil)
	for name, frame := range malformed {
		in := append(append(bytes.Clone(hello), frame...), hello...)
		answers, _, err := k.answerAll(nil, in)
		if !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v", name, err)
		}
		if len(answers) != 4+1+helloSize+5 || answers[len(answers)-1] != statusMalformed {
			t.Errorf("%s: answered %x", name, answers)
		}
	}
}

func TestStatuses(t *testing.T) {
	for status, want := range statusErrors {
		if want == nil {
			continue
		}
		if got := statusOf(statusError(byte(status))); int(got) != status {
			t.Errorf("status %d comes back as %d", status, got)
		}
	}
	if statusOf(errors.New("anything else")) != statusInternal {
		t.Error("an unknown error has a status of its own")
	}
	if statusError(statusOK) == nil || statusError(200) == nil {
		t.Error("a status that is no error's became no error")
	}
}

func FuzzRequest(f *testing.F) {
	k := testKeyring(f)
	service, _ := ServiceInfo("my-database", 2, 64)
	vm, _ := VMInfo(TierVM, testSubject, "disk", 1, 64)
	for _, r := range []request{
		{op: opHello}, deriveRequest(1, 32, []byte("a")), deriveRequest(1, 64, service), deriveRequest(2, 64, vm),
		{op: opSign, message: signedTuple(LabelAudit, [][]byte{[]byte("x"), nil})},
	} {
		f.Add(r.appendFrame(nil)[4:])
	}
	for _, r := range refusedRequests() {
		f.Add(r.appendFrame(nil)[4:])
	}
	seed, _ := expand(filledPage(f, testMaster(f, 0))[pagePRKAt:][:prkSize], IdentityInfo(1), 32)
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseRequest(body)
		if err != nil {
			if r.op != 0 || !errors.Is(err, errMalformed) && !errors.Is(err, ErrRefused) {
				t.Fatalf("%+v, %v", r, err)
			}
			return
		}
		if got := r.appendFrame(nil)[4:]; !bytes.Equal(got, body) {
			t.Fatalf("%x was read as %x", body, got)
		}
		if r.op == opDerive {
			checkDerived(t, r)
		}
		if r.op == opSign && !bytes.HasPrefix(r.message, tuple.Encode([]byte(LabelRelease))) &&
			!bytes.HasPrefix(r.message, tuple.Encode([]byte(LabelAudit))) {
			t.Fatalf("would sign %q", r.message)
		}
		result, err := k.do(body)
		if err == nil && bytes.Contains(result, seed) {
			t.Fatal("the identity's seed came out")
		}
	})
}

// checkDerived holds what is derived to the two forms that keys have.
func checkDerived(t *testing.T, r request) {
	if r.length != 32 && r.length != 64 {
		t.Fatalf("would derive %d octets", r.length)
	}
	if r.info[0] != 0 {
		if CheckKeyName(string(r.info)) != nil {
			t.Fatalf("would derive %q", r.info)
		}
		return
	}
	if !bytes.HasPrefix(r.info, info(labelKey)) || bytes.HasPrefix(r.info, info(labelIdentity)) ||
		bytes.Equal(r.info, RealmIDInfo()) {
		t.Fatalf("would derive %x", r.info)
	}
}

// The answers do not depend on how the requests were cut on their way, and are as many as the requests.
func FuzzAnswerAll(f *testing.F) {
	k := testKeyring(f)
	stream := request{op: opHello}.appendFrame(nil)
	stream = deriveRequest(1, 32, []byte("a")).appendFrame(stream)
	stream = deriveRequest(3, 32, []byte("a")).appendFrame(stream)
	stream = request{op: opSign, message: signedTuple(LabelAudit, nil)}.appendFrame(stream)
	f.Add(stream, 7)
	f.Add(append(stream, malformed["HTTP"]...), 40)
	f.Fuzz(func(t *testing.T, stream []byte, cut int) {
		whole, rest, err := k.answerAll(nil, stream)
		if cut < 0 || cut > len(stream) {
			cut = len(stream) / 2
		}
		parts, left, partErr := k.answerAll(nil, stream[:cut])
		if partErr == nil {
			parts, left, partErr = k.answerAll(parts, append(bytes.Clone(left), stream[cut:]...))
		}
		if !bytes.Equal(whole, parts) || !bytes.Equal(rest, left) || (err == nil) != (partErr == nil) {
			t.Fatalf("cut at %d: %x and %x, %v and %v", cut, whole, parts, err, partErr)
		}
		for len(whole) > 0 {
			body, after, ok, err := splitFrame(whole, maxAnswer)
			if err != nil || !ok || (body[0] != statusOK) != (len(body) == 1) {
				t.Fatalf("an answer that is none: %x, %v", whole, err)
			}
			whole = after
		}
	})
}
