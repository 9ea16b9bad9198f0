package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keybroker/derive"
	"keybroker/internal/tuple"
)

func verify(tb testing.TB, dir string, opts VerifyOptions) *Report {
	tb.Helper()
	rep, err := Verify(dir, opts)
	if err != nil {
		tb.Fatal(err)
	}
	return rep
}

// fill writes a log of releases with a checkpoint now and then, closes it and returns its lines.
func fill(t *testing.T, k *keeper, n int) [][]byte {
	t.Helper()
	cfg := k.config()
	cfg.SyncEvery = time.Hour // no checkpoint but these
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if _, err := l.Append(Record{Event: EventRelease, Decision: Granted, Subject: fmt.Sprint("vm", i), Names: []string{"disk"}}, Written); err != nil {
			t.Fatal(err)
		}
		if i%10 == 9 {
			if err := l.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return readLines(t, k.dir, 1)
}

func readLines(tb testing.TB, dir string, number int) [][]byte {
	tb.Helper()
	data, err := os.ReadFile(filepath.Join(dir, fileName(number)))
	if err != nil {
		tb.Fatal(err)
	}
	lines := bytes.Split(data, []byte("\n"))
	if len(lines[len(lines)-1]) != 0 {
		tb.Fatal("the file does not end with a line's end")
	}
	return lines[:len(lines)-1]
}

func writeLines(tb testing.TB, dir string, lines [][]byte) {
	tb.Helper()
	if err := os.WriteFile(filepath.Join(dir, fileName(1)), append(bytes.Join(lines, []byte("\n")), '\n'), 0o600); err != nil {
		tb.Fatal(err)
	}
}

// rechain makes the lines from i on a consistent chain again, as somebody does who may write to the host, and signs the
// checkpoints anew when there is a key.
func rechain(tb testing.TB, lines [][]byte, i int, key ed25519.PrivateKey) [][]byte {
	tb.Helper()
	lines = slices.Clone(lines)
	for ; i < len(lines); i++ {
		r, err := Parse(lines[i])
		if err != nil {
			tb.Fatal(err)
		}
		if r.Seq, r.Prev = uint64(i+1), (Hash{}); i > 0 {
			r.Prev = sha256.Sum256(lines[i-1])
		}
		if r.Checkpoint != nil && key != nil {
			r.Checkpoint.Seq, r.Checkpoint.Hash = uint64(i), r.Prev
			fields, _ := r.Checkpoint.fields()
			sig := ed25519.Sign(key, tuple.Encode(append([][]byte{[]byte(derive.LabelAudit)}, fields...)...))
			r.Checkpoint.Signature = base64.RawURLEncoding.EncodeToString(sig)
		}
		lines[i] = r.Encode(nil)
	}
	return lines
}

// Each way to change the log shows, with its place and what was found.
func TestVerifyShowsTampering(t *testing.T) {
	k := newKeeper(t)
	lines := fill(t, k, 35)
	head := k.head
	if rep := verify(t, k.dir, VerifyOptions{Heads: []Head{head}, PublicKeys: []ed25519.PublicKey{k.public()}}); !rep.OK() || rep.Head != head || rep.Checkpoints != 4 {
		t.Fatalf("the log as it was written: %+v", rep)
	}
	edit := func(i int) [][]byte {
		out := slices.Clone(lines)
		out[i] = bytes.Replace(out[i], []byte(`"vm`), []byte(`"xm`), 1)
		return out
	}
	_, foreign, _ := ed25519.GenerateKey(nil)
	last := len(lines) - 1
	for name, c := range map[string]struct {
		lines [][]byte
		kind  string
		line  int
	}{
		"edit":                      {edit(4), "edit", 6},
		"edit of the first":         {edit(0), "edit", 2},
		"edit of the last":          {rechain(t, edit(last-1), last, nil), "head", last + 1},
		"removal":                   {slices.Delete(slices.Clone(lines), 6, 8), "removal", 7},
		"removal of the first":      {slices.Delete(slices.Clone(lines), 0, 1), "recomputed", 0}, // unless older files are missed: see below
		"insertion":                 {slices.Insert(slices.Clone(lines), 6, lines[5]), "insertion", 7},
		"swap":                      {slices.Concat(lines[:5], [][]byte{lines[6], lines[5]}, lines[7:]), "removal", 6},
		"not JSON":                  {slices.Concat(lines[:5], [][]byte{[]byte("x")}, lines[6:]), "unreadable", 6},
		"another spelling":          {slices.Concat(lines[:5], [][]byte{append(slices.Clone(lines[5]), ' ')}, lines[6:]), "unreadable", 6},
		"long line":                 {slices.Concat(lines[:5], [][]byte{bytes.Repeat([]byte("x"), MaxLine*3)}, lines[6:]), "unreadable", 6},
		"recomputed":                {rechain(t, edit(4), 5, nil), "recomputed", 11},
		"recomputed after removal":  {rechain(t, slices.Delete(slices.Clone(lines), 3, 4), 3, nil), "recomputed", 10},
		"recomputed, signed anew":   {rechain(t, edit(4), 5, foreign), "signature", 11},
		"recomputed without a sign": {rechain(t, slices.DeleteFunc(edit(4), isCheckpoint), 5, nil), "signature", 0},
		"cut tail":                  {lines[:20], "cut", 0},
		"another head":              {rechain(t, edit(last-2), last-1, k.private), "head", last + 1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeLines(t, dir, c.lines)
			rep := verify(t, dir, VerifyOptions{Heads: []Head{head}, PublicKeys: []ed25519.PublicKey{k.public()}})
			if name == "removal of the first" {
				// The rest is what the log is after older files were moved away: whole, and it says that it is a rest.
				if !rep.OK() || rep.First.Seq != 2 || !strings.Contains(strings.Join(rep.Notes, "\n"), "begins with record 2") {
					t.Errorf("%+v", rep)
				}
				return
			}
			i := slices.IndexFunc(rep.Breaks, func(b Break) bool { return b.Kind == c.kind && (c.line == 0 || b.Line == c.line) })
			if i < 0 {
				t.Fatalf("want %s at line %d, got %v", c.kind, c.line, rep.Breaks)
			}
			if b := rep.Breaks[i]; b.Want == "" || b.Got == "" || !errors.Is(b, ErrBroken) {
				t.Errorf("%+v", b)
			}
		})
	}
}

func isCheckpoint(line []byte) bool { return bytes.Contains(line, []byte(`"checkpoint"`)) }

// One edit is one break, not one for every line that follows.
func TestOneEditIsOneBreak(t *testing.T) {
	k := newKeeper(t)
	lines := fill(t, k, 25)
	for _, edit := range []string{`"xm4"`, `"xm4" `, `"`} {
		changed := slices.Clone(lines)
		changed[4] = bytes.Replace(lines[4], []byte(`"vm4"`), []byte(edit), 1)
		writeLines(t, k.dir, changed)
		rep := verify(t, k.dir, VerifyOptions{Heads: []Head{k.head}, PublicKeys: []ed25519.PublicKey{k.public()}})
		if len(rep.Breaks) != 1 {
			t.Errorf("%s: %v", edit, rep.Breaks)
		}
	}
}

// The broker does not go on in a log that somebody changed, says where, and leaves it as it is.
func TestOpenRefusesTamperedLog(t *testing.T) {
	k := newKeeper(t)
	lines := fill(t, k, 35)
	edited := slices.Clone(lines)
	edited[4] = bytes.Replace(edited[4], []byte(`"vm`), []byte(`"xm`), 1)
	for name, c := range map[string]struct {
		lines [][]byte
		where string
	}{
		"edit":       {edited, "audit-000001.jsonl:6"},
		"removal":    {slices.Delete(slices.Clone(lines), 6, 8), "audit-000001.jsonl:7"},
		"cut tail":   {lines[:20], "cut"},
		"recomputed": {rechain(t, edited, 5, k.private), fmt.Sprintf("audit-000001.jsonl:%d", len(lines))},
		"junk":       {append(slices.Clone(lines), []byte("x")), fmt.Sprintf("audit-000001.jsonl:%d", len(lines)+1)},
		"no records": {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := k.config()
			cfg.Dir = t.TempDir()
			writeLines(t, cfg.Dir, c.lines)
			before, _ := os.ReadFile(filepath.Join(cfg.Dir, fileName(1)))
			for range 2 { // the first one must not have kept the lock
				l, err := Open(cfg)
				if !errors.Is(err, ErrBroken) || l != nil {
					t.Fatalf("%v, want ErrBroken", err)
				}
				if !strings.Contains(err.Error(), c.where) || !strings.Contains(err.Error(), "keybroker audit verify") {
					t.Errorf("%v", err)
				}
			}
			if after, _ := os.ReadFile(filepath.Join(cfg.Dir, fileName(1))); !bytes.Equal(before, after) {
				t.Error("Open changed the log")
			}
		})
	}
	t.Run("no log", func(t *testing.T) {
		cfg := k.config()
		cfg.Dir = filepath.Join(t.TempDir(), "new")
		if _, err := Open(cfg); !errors.Is(err, ErrBroken) {
			t.Errorf("a stored head and no log: %v", err)
		}
	})
}

// Wherever the last write was cut off, the broker starts, keeps every whole record and says what it did.
func TestOpenRecoversUnfinishedLine(t *testing.T) {
	k := newKeeper(t)
	fill(t, k, 12)
	path := filepath.Join(k.dir, fileName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	from := bytes.LastIndexByte(data[:len(data)-1], '\n') + 1
	lines := bytes.Count(data[:from], []byte("\n"))
	k.head = Head{}
	for n := from; n < len(data); n += 7 {
		if err := os.WriteFile(path, data[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(k.config())
		if err != nil {
			t.Fatalf("cut to %d octets: %v", n, err)
		}
		if err := l.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		rep := verify(t, k.dir, VerifyOptions{Heads: []Head{k.head}, PublicKeys: []ed25519.PublicKey{k.public()}})
		want := uint64(1)
		if n == from {
			want = 0
		}
		if !rep.OK() || rep.Events[EventRecovered] != want || rep.Records < uint64(lines) {
			t.Fatalf("cut to %d octets: %+v", n, rep)
		}
		k.head = Head{}
	}
}

// A power cut can leave zeros where a write got lost, and later writes behind them. What is behind the stored head and damaged
// so is cut off and kept aside; before it, it is no accident.
func TestOpenAfterPowerCut(t *testing.T) {
	k := newKeeper(t)
	lines := fill(t, k, 12)
	head := func(n int) Head { return Head{uint64(n), sha256.Sum256(lines[n-1])} }
	damaged := slices.Clone(lines)
	damaged[8] = append(slices.Clone(lines[8][:20]), make([]byte, MaxLine*2)...)

	writeLines(t, k.dir, damaged)
	k.head = head(9)
	if _, err := Open(k.config()); !errors.Is(err, ErrBroken) {
		t.Fatalf("damage before the stored head: %v", err)
	}
	k.head = head(8)
	l := openTest(t, k, nil)
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, k.dir, VerifyOptions{Heads: []Head{head(8), k.head}, PublicKeys: []ed25519.PublicKey{k.public()}})
	if !rep.OK() || rep.Events[EventRecovered] != 1 {
		t.Errorf("%+v", rep)
	}
	kept, err := filepath.Glob(filepath.Join(k.dir, "audit-000001.cut-*"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("kept aside: %q, %v", kept, err)
	}
	want := append(bytes.Join(damaged[8:], []byte("\n")), '\n')
	if got, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d octets are kept, %v; want %d", len(got), err, len(want))
	}
}

// After SetAside a new log begins; the old one is whole in its folder.
func TestSetAside(t *testing.T) {
	k := newKeeper(t)
	lines := fill(t, k, 12)
	writeLines(t, k.dir, lines[:5])
	l := openTest(t, newKeeper(t), nil)
	if _, err := SetAside(l.cfg.Dir, l.Stats().SignedAt); !errors.Is(err, ErrHeld) {
		t.Errorf("of a running broker: %v", err)
	}
	aside, err := SetAside(k.dir, l.Stats().SignedAt)
	if err != nil {
		t.Fatal(err)
	}
	if got := readLines(t, aside, 1); len(got) != 5 {
		t.Errorf("%d lines are set aside", len(got))
	}
	k.head = Head{}
	anew := openTest(t, k, nil)
	if _, err := anew.Append(Record{Event: EventReset}, Durable); err != nil {
		t.Fatal(err)
	}
	if err := anew.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if rep := verify(t, k.dir, VerifyOptions{}); !rep.OK() || rep.First.Seq != 1 {
		t.Errorf("%+v", rep)
	}
}
