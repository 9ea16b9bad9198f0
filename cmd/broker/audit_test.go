package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/config"
	"keybroker/internal/store"
	"keybroker/internal/tuple"
)

// auditedState is a state folder with a store and a log of 20 records, of which the sixth is a refusal.
type auditedState struct {
	dir  string
	p    config.Paths
	head audit.Head
	pin  string
}

func newAuditedState(t *testing.T) *auditedState {
	t.Helper()
	s := &auditedState{dir: t.TempDir()}
	var err error
	if s.p, err = config.PathsUnder(s.dir); err != nil {
		t.Fatal(err)
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.pin = inject.PinOf(public).String()
	st, err := store.Open(s.p.Store)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	l, err := audit.Open(audit.Config{
		Dir: s.p.AuditDir, Realm: strings.Repeat("0", 32), LoadHead: func() (audit.Head, error) { return audit.Head{}, nil },
		Sign: func(_ context.Context, fields ...[]byte) ([]byte, error) {
			return ed25519.Sign(private, tuple.Encode(append([][]byte{[]byte(derive.LabelAudit)}, fields...)...)), nil
		},
		SaveHead: func(h audit.Head) error {
			s.head = h
			return st.Update(func(tx store.Tx) error { return tx.Put(audit.HeadBucket, audit.HeadKey, []byte(h.String())) })
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		r := audit.Record{Event: audit.EventRelease, Decision: audit.Granted, Tier: "service", Subject: fmt.Sprint("db-", i%4), Names: []string{fmt.Sprint("db-", i%4)}}
		if i == 5 {
			r.Event, r.Decision, r.Code, r.Reason = audit.EventRefusal, audit.Refused, "no-policy", "clear \x1b[2J the screen"
		}
		if _, err := l.Append(r, audit.Written); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// keybroker runs one command line in this state folder.
func (s *auditedState) keybroker(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	g := &globals{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
	status = run(t.Context(), g, append([]string{"--state-dir", s.dir}, args...))
	return out.String(), errs.String(), status
}

func (s *auditedState) edit(t *testing.T, change func([]byte) []byte) {
	t.Helper()
	path := filepath.Join(s.p.AuditDir, "audit-000001.jsonl")
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(data), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func mustContain(t *testing.T, what, text string, wanted ...string) {
	t.Helper()
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			t.Errorf("%s: no %q in:\n%s", what, w, text)
		}
	}
}

func TestAuditVerify(t *testing.T) {
	s := newAuditedState(t)
	out, errs, status := s.keybroker(t, "audit", "verify", "--identity", s.pin, "--head", s.head.String())
	if status != exitOK || errs != "" {
		t.Errorf("a whole log: status %d, %s", status, errs)
	}
	mustContain(t, "a whole log", out, "records in 1 file", s.head.String(), "signs all up to record", "result       ok")

	held, err := store.Open(s.p.Store)
	if err != nil {
		t.Fatal(err)
	}
	out, _, status = s.keybroker(t, "audit", "verify")
	held.Close()
	if status != exitOK {
		t.Errorf("beside a broker: status %d", status)
	}
	mustContain(t, "beside a broker", out, "a broker holds the store", "signatures not checked", "no head was given")

	for _, args := range [][]string{{"--head", "1"}, {"--identity", "ed25519:x"}, {"--what"}, {"more"}} {
		if _, errs, status := s.keybroker(t, append([]string{"audit", "verify"}, args...)...); status != exitUsage || !strings.Contains(errs, "keybroker: error: ") {
			t.Errorf("%q: status %d, %s", args, status, errs)
		}
	}
	// A head that this log does not have is the head's fault or a reason to look; no reset mends that.
	for _, head := range []string{fmt.Sprintf("%d:%064d", s.head.Seq, 1), fmt.Sprintf("%d:%064d", s.head.Seq+1000, 1)} {
		out, errs, status := s.keybroker(t, "audit", "verify", "--head", head)
		if status != exitFailure || strings.Contains(out, "at least, the stored head") || strings.Contains(errs, "reset") || !strings.Contains(errs, "hint: the log agrees with itself") {
			t.Errorf("--head %s: status %d, %s%s", head, status, out, errs)
		}
	}
	other := inject.PinOf(make([]byte, ed25519.PublicKeySize)).String()
	if out, _, status := s.keybroker(t, "audit", "verify", "--identity", other); status != exitFailure || !strings.Contains(out, "signature") {
		t.Errorf("under another identity: status %d, %s", status, out)
	}

	s.edit(t, func(b []byte) []byte { return bytes.Replace(b, []byte("no-policy"), []byte("no-polish"), 1) })
	out, errs, status = s.keybroker(t, "audit", "verify")
	if status != exitFailure {
		t.Errorf("an edited log: status %d", status)
	}
	mustContain(t, "an edited log", out, "BROKEN", "audit-000001.jsonl:7: edit", "result       broken")
	mustContain(t, "an edited log", errs, "keybroker: error: the audit log is broken in 1 place", "keybroker: hint: ")
}

// A cut tail shows by the store's head, without any flag.
func TestAuditVerifyReadsTheStore(t *testing.T) {
	s := newAuditedState(t)
	s.edit(t, func(b []byte) []byte { return b[:bytes.Index(b, []byte(`{"seq":15,`))] })
	out, _, status := s.keybroker(t, "audit", "verify")
	if status != exitFailure {
		t.Errorf("status %d", status)
	}
	mustContain(t, "cut", out, "cut: expected records up to", "found an end after record 14")
	if out, _, status := s.keybroker(t, "audit", "verify", "--dir", s.p.AuditDir); status != exitOK || !strings.Contains(out, "--dir names a log by itself") {
		t.Errorf("by itself: status %d, %s", status, out)
	}
}

func TestAuditQuery(t *testing.T) {
	s := newAuditedState(t)
	out, errs, status := s.keybroker(t, "audit", "query", "--event", "refusal")
	if status != exitOK || errs != "" || strings.Count(out, "\n") != 2 || strings.ContainsRune(out, 0x1b) {
		t.Errorf("status %d, %s, %q", status, errs, out)
	}
	mustContain(t, "refusals", out, "SEQ", "db-1", "no-policy", "the screen")
	for args, want := range map[string]int{
		"--json": 21, "--json --limit 3": 3, "--json --subject db-2": 5, "--json --since 1h --code no-policy": 1,
		"--json --until 1h": 0, "--json --since 2000-01-01 --tier service": 20, "--json --tier vm": 0,
	} {
		out, errs, status := s.keybroker(t, append([]string{"audit", "query"}, strings.Fields(args)...)...)
		if status != exitOK || strings.Count(out, "\n") != want {
			t.Errorf("%s: status %d, %s, %d lines, want %d", args, status, errs, strings.Count(out, "\n"), want)
		}
		for line := range strings.Lines(out) {
			if _, err := audit.Parse([]byte(strings.TrimSuffix(line, "\n"))); err != nil {
				t.Errorf("%s: %v", args, err)
			}
		}
	}
	for _, args := range [][]string{{"--since", "yesterday"}, {"--limit", "-1"}, {"--until", "-5m"}} {
		if _, _, status := s.keybroker(t, append([]string{"audit", "query"}, args...)...); status != exitUsage {
			t.Errorf("%q: status %d", args, status)
		}
	}
	elsewhere := &auditedState{dir: t.TempDir()}
	if _, errs, status := elsewhere.keybroker(t, "audit", "query"); status != exitFailure || !strings.Contains(errs, "keybroker: hint: ") {
		t.Errorf("where no broker ran: status %d, %s", status, errs)
	}
}

// A broken log is set aside on request, with a reason, and by no broker that runs; a new one begins and says so.
func TestAuditReset(t *testing.T) {
	s := newAuditedState(t)
	pass := filepath.Join(s.dir, "pass")
	if err := os.WriteFile(pass, []byte("correct horse battery staple"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := s.keybroker(t, "init", "--slot", "passphrase", "--passphrase-file", pass); status != exitOK {
		t.Fatal(errs)
	}
	var err error
	if s.head, err = storedHead(s.p.Store); err != nil { // init wrote a record too
		t.Fatal(err)
	}
	reset := []string{"audit", "reset", "--reason", "disk was restored"}
	if _, errs, status := s.keybroker(t, reset...); status != exitFailure || !strings.Contains(errs, "whole") {
		t.Errorf("a whole log: status %d, %s", status, errs)
	}
	s.edit(t, func(b []byte) []byte { return b[:bytes.Index(b, []byte(`{"seq":15,`))] })
	if _, _, status := s.keybroker(t, "audit", "reset"); status != exitUsage {
		t.Errorf("without a reason: status %d", status)
	}
	held, err := store.Open(s.p.Store)
	if err != nil {
		t.Fatal(err)
	}
	if _, errs, status := s.keybroker(t, reset...); status != exitFailure || !strings.Contains(errs, "end its `keybroker serve`") {
		t.Errorf("beside a broker: status %d, %s", status, errs)
	}
	held.Close()
	if _, errs, status := s.keybroker(t, reset...); status != exitOK || !strings.Contains(errs, "keybroker: warning: ") {
		t.Fatalf("status %d, %s", status, errs)
	}
	aside, err := filepath.Glob(filepath.Join(s.p.AuditDir, "set-aside-*", "audit-000001.jsonl"))
	if err != nil || len(aside) != 1 {
		t.Errorf("set aside: %q, %v", aside, err)
	}
	out, _, status := s.keybroker(t, "audit", "verify")
	if status != exitOK {
		t.Errorf("afterwards: status %d", status)
	}
	mustContain(t, "afterwards", out, "1 record in 1 file", "reset: disk was restored", s.head.String())
	if h, err := storedHead(s.p.Store); err != nil || h.Seq != 1 {
		t.Errorf("stored head: %v, %v", h, err)
	}
	if err := os.RemoveAll(s.p.AuditDir); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := s.keybroker(t, reset...); status != exitOK || !strings.HasSuffix(errs, "of the one before nothing was left\n") {
		t.Errorf("with the folder gone: status %d, %s", status, errs)
	}
	if _, err := os.Stat(s.p.AuditDir); errors.Is(err, os.ErrNotExist) {
		t.Error("no new log")
	}
}
