package tpm2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	gotpm "github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"keybroker/internal/octet"
	"keybroker/seal"
	"keybroker/seal/tpm2/tpm2test"
)

var binding = seal.Binding{Realm: seal.RealmID{1}, Slot: seal.SlotID{2}}

func protector(t testing.TB, path, pcrs string) *Protector {
	t.Helper()
	sel, err := ParseSelection(pcrs)
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{Path: path, PCRs: sel})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func enroll(t testing.TB, p *Protector) (jsontext.Value, seal.Key) {
	t.Helper()
	raw, k, err := p.Enroll(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	return raw, k
}

func mustOpen(t testing.TB, p *Protector, raw jsontext.Value, want seal.Key) {
	t.Helper()
	k, err := p.Open(t.Context(), binding, raw)
	if err != nil {
		t.Fatal(err)
	}
	if !k.Equal(want) {
		t.Fatal("opened to another key")
	}
}

func TestSealAndReboot(t *testing.T) {
	tpm := tpm2test.Start(t)
	for _, pcrs := range []string{"sha256:7", "sha256:0+7+11", "sha384:7", "sha256:0+1+2+3+4+5+6+7+8+9+10+23"} {
		p := protector(t, tpm.Path, pcrs)
		raw, k := enroll(t, p)
		mustOpen(t, p, raw, k)
		if left := tpm.Handles(); len(left) != 0 {
			t.Fatalf("%s: handles left: %x", pcrs, left)
		}
		if what, err := p.Describe(raw); err != nil || what != "PCR "+pcrs {
			t.Errorf("described as %q, %v", what, err)
		}
		tpm.Reboot()
		mustOpen(t, p, raw, k)
	}
}

func TestPCRChanged(t *testing.T) {
	tpm := tpm2test.Start(t)
	p := protector(t, tpm.Path, "sha256:7+11+12")
	raw, k := enroll(t, p)
	tpm.Extend(7)
	tpm.Extend(12)
	_, err := p.Open(t.Context(), binding, raw)
	var changed *PCRChangedError
	if !errors.Is(err, ErrPCRChanged) || !errors.As(err, &changed) {
		t.Fatal(err)
	}
	zero := strings.Repeat("00", 32)
	text := err.Error()
	for _, want := range []string{"PCR 7 (sha256) changed from " + zero + " to ", "PCR 12 (sha256) changed from " + zero + " to "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q has not %q", text, want)
		}
	}
	if strings.Contains(text, "PCR 11") || strings.Contains(text, "\n") || len(changed.Changes) != 2 || bytes.Equal(changed.Changes[0].To, changed.Changes[0].From) {
		t.Errorf("wrong changes: %s", text)
	}
	if left := tpm.Handles(); len(left) != 0 {
		t.Errorf("handles left: %x", left)
	}
	tpm.Reboot()
	mustOpen(t, p, raw, k)
}

func TestOtherTPM(t *testing.T) {
	one, two := tpm2test.Start(t), tpm2test.Start(t)
	raw, _ := enroll(t, protector(t, one.Path, "sha256:7"))
	if _, err := protector(t, two.Path, "sha256:7").Open(t.Context(), binding, raw); !errors.Is(err, ErrOtherTPM) {
		t.Errorf("another TPM: %v", err)
	}
	one.Clear()
	if _, err := protector(t, one.Path, "sha256:7").Open(t.Context(), binding, raw); !errors.Is(err, ErrOtherTPM) {
		t.Errorf("a cleared TPM: %v", err)
	}
	if left := one.Handles(); len(left) != 0 {
		t.Errorf("handles left: %x", left)
	}
}

func TestMissingTPM(t *testing.T) {
	tpm := tpm2test.Start(t)
	raw, _ := enroll(t, protector(t, tpm.Path, "sha256:7"))
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(t.TempDir(), "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), file, dead} {
		_, err := protector(t, path, "sha256:7").Open(t.Context(), binding, raw)
		if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a protector without a path")
	}
}

// bus records all that crosses it.
type bus struct{ log bytes.Buffer }

func (b *bus) saw(k seal.Key) bool { return bytes.Contains(b.log.Bytes(), k.Octets()) }

func (b *bus) on(p *Protector) *Protector {
	p.tap = func(octets []byte) { b.log.Write(octets) }
	return p
}

func TestNothingOnTheBus(t *testing.T) {
	tpm := tpm2test.Start(t)
	var b bus
	p := b.on(protector(t, tpm.Path, "sha256:7"))
	raw, k := enroll(t, p)
	if b.saw(k) {
		t.Error("the key crosses the bus when it is sealed")
	}
	b.log.Reset()
	mustOpen(t, p, raw, k)
	if b.saw(k) || b.log.Len() == 0 {
		t.Errorf("the key crosses the bus when it is unsealed (%d octets heard)", b.log.Len())
	}
	// The bus does hear: the sealed object crosses it in the clear.
	var ps params
	if err := json.Unmarshal(raw, &ps); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.log.Bytes(), ps.SRK) {
		t.Error("the bus did not hear the SRK's public area: this test hears nothing")
	}
}

// Who stands in the bus and answers with an SRK of his own does not get a session salted to it.
func TestPinnedSRK(t *testing.T) {
	tpm := tpm2test.Start(t)
	p := protector(t, tpm.Path, "sha256:7")
	raw, _ := enroll(t, p)
	var ps params
	if err := json.Unmarshal(raw, &ps); err != nil {
		t.Fatal(err)
	}
	ps.SRK[len(ps.SRK)-1] ^= 1
	edited, err := json.Marshal(&ps)
	if err != nil {
		t.Fatal(err)
	}
	var b bus
	if _, err := b.on(p).Open(t.Context(), binding, edited); !errors.Is(err, ErrOtherTPM) {
		t.Fatal(err)
	}
	if bytes.Contains(b.log.Bytes(), ps.Private[len(ps.Private)-32:]) {
		t.Error("the object was loaded under another SRK")
	}
}

func TestBadParams(t *testing.T) {
	tpm := tpm2test.Start(t)
	p := protector(t, tpm.Path, "sha256:7")
	good, k := enroll(t, p)
	var ps params
	if err := json.Unmarshal(good, &ps); err != nil {
		t.Fatal(err)
	}
	edits := map[string]func(*params){
		"bank":      func(p *params) { p.Bank = "sha1" },
		"no pcrs":   func(p *params) { p.PCRs, p.Values = nil, nil },
		"pcr range": func(p *params) { p.PCRs = []int{24} },
		"pcr sign":  func(p *params) { p.PCRs = []int{-1} },
		"values":    func(p *params) { p.Values = append(p.Values, p.Values[0]) },
		"value":     func(p *params) { p.Values[0] = p.Values[0][:31] },
		"no srk":    func(p *params) { p.SRK = nil },
		"long":      func(p *params) { p.Private = make([]byte, 4096) },
	}
	for name, edit := range edits {
		var ps params
		json.Unmarshal(good, &ps)
		edit(&ps)
		raw, err := json.Marshal(&ps)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Open(t.Context(), binding, raw); !errors.Is(err, ErrParams) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, edit := range map[string]func(*params){
		"private": func(p *params) { p.Private[40] ^= 1 },
		"public":  func(p *params) { p.Public[20] ^= 1 },
		"empty":   func(p *params) { p.Private = nil },
	} {
		var ps params
		json.Unmarshal(good, &ps)
		edit(&ps)
		raw, _ := json.Marshal(&ps)
		if _, err := p.Open(t.Context(), binding, raw); !errors.Is(err, ErrObject) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, raw := range []string{"", "{}", "null", `{"bank":"sha256","x":1}`} {
		if _, err := p.Open(t.Context(), binding, jsontext.Value(raw)); !errors.Is(err, ErrParams) {
			t.Errorf("%s: %v", raw, err)
		}
		if _, err := p.Describe(jsontext.Value(raw)); !errors.Is(err, ErrParams) {
			t.Errorf("describing %s: %v", raw, err)
		}
	}
	mustOpen(t, p, good, k)
}

// A client that was killed on a TPM without resource manager left its objects there: the next one makes room.
func TestLeftovers(t *testing.T) {
	tpm := tpm2test.Start(t)
	p := protector(t, tpm.Path, "sha256:7")
	raw, k := enroll(t, p)
	for range 3 {
		tpm.Do(func(d transport.TPM) error {
			_, err := gotpm.CreatePrimary{PrimaryHandle: gotpm.TPMRHOwner, InPublic: gotpm.New2B(gotpm.ECCSRKTemplate)}.Execute(d)
			return err
		})
	}
	mustOpen(t, p, raw, k)
}

func TestOwnerPassword(t *testing.T) {
	tpm := tpm2test.Start(t)
	tpm.Do(func(d transport.TPM) error {
		_, err := gotpm.HierarchyChangeAuth{
			AuthHandle: gotpm.AuthHandle{Handle: gotpm.TPMRHOwner, Auth: gotpm.PasswordAuth(nil)},
			NewAuth:    gotpm.TPM2BAuth{Buffer: []byte("owner")},
		}.Execute(d)
		return err
	})
	if _, _, err := protector(t, tpm.Path, "sha256:7").Enroll(t.Context(), binding); !errors.Is(err, ErrOwnerAuth) {
		t.Error(err)
	}
}

func TestNoSelection(t *testing.T) {
	p, err := New(Config{Path: "/dev/null"})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Enroll(t.Context(), binding); err == nil {
		t.Error("sealed to no PCR")
	}
}

// A TPM that hangs is given up when the context ends.
func TestHungTPM(t *testing.T) {
	tpm := tpm2test.Start(t)
	p := protector(t, tpm.Path, "sha256:7")
	raw, _ := enroll(t, p)
	tpm.Pause()
	defer tpm.Resume()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Open(ctx, binding, raw); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// answers is a TPM that gives the same answers in turn, the last one for ever.
func answers(t *testing.T, codes ...gotpm.TPMRC) (path string, asked *int) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	asked = new(int)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 4096)
			for {
				if _, err := c.Read(buf); err != nil {
					break
				}
				rc := codes[min(*asked, len(codes)-1)]
				*asked++
				answer := binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc))
				// In pieces, as a stream may deliver it.
				c.Write(answer[:3])
				c.Write(answer[3:])
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path, asked
}

func TestCodes(t *testing.T) {
	for _, c := range []struct {
		codes []gotpm.TPMRC
		want  error
		asked int
	}{
		{[]gotpm.TPMRC{gotpm.TPMRCLockout}, ErrLockout, 1},
		{[]gotpm.TPMRC{gotpm.TPMRCRetry, gotpm.TPMRCTesting, gotpm.TPMRCLockout}, ErrLockout, 3},
		{[]gotpm.TPMRC{gotpm.TPMRCInitialize}, ErrMissing, 1},
		{[]gotpm.TPMRC{gotpm.TPMRCRetry}, ErrBusy, 0},
	} {
		path, asked := answers(t, c.codes...)
		_, _, err := protector(t, path, "sha256:7").Enroll(t.Context(), binding)
		if !errors.Is(err, c.want) {
			t.Errorf("%v: %v", c.codes, err)
		}
		if c.asked > 0 && *asked != c.asked {
			t.Errorf("%v: asked %d times, want %d", c.codes, *asked, c.asked)
		}
	}
}

func TestReadResponse(t *testing.T) {
	for _, bad := range []string{"", "\x80\x01", "\x80\x01\x00\x00\x00\x09\x00\x00\x00\x00", "\x80\x01\x7f\xff\xff\xff\x00\x00\x00\x00", "\x80\x01\x00\x00\x00\x0c\x00\x00\x00\x00x"} {
		if r, err := readResponse(strings.NewReader(bad)); err == nil || r != nil {
			t.Errorf("%q: %q, %v", bad, r, err)
		}
	}
}

func TestParseSelection(t *testing.T) {
	for _, s := range []string{"sha256:7", "sha384:0+7+11", "sha512:23"} {
		if sel, err := ParseSelection(s); err != nil || sel.String() != s {
			t.Errorf("%s: %s, %v", s, sel, err)
		}
	}
	if sel, err := ParseSelection("sha256:11+0"); err != nil || !slices.Equal(sel.pcrs, []int{0, 11}) {
		t.Errorf("unsorted: %v, %v", sel, err)
	}
	for _, s := range []string{"", "7", "sha256", "sha256:", "sha1:7", "sha256:24", "sha256:7+7", "sha256:+7", "sha256:07", "sha256:-1", "sha256:7,8", "SHA256:7", "sha256:7 "} {
		if sel, err := ParseSelection(s); err == nil {
			t.Errorf("%q read as %s", s, sel)
		}
	}
}

// Parameters that are read describe a selection that can be read again; an error means none.
func FuzzParseParams(f *testing.F) {
	good, err := json.Marshal(&params{Bank: "sha256", PCRs: []int{7}, Values: []octet.Hex{make([]byte, 32)}, SRK: []byte{1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"bank":"sha384","pcrs":[],"values":[],"srk":"","public":"","private":""}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parse(raw)
		if err != nil {
			if s != nil || !errors.Is(err, ErrParams) || err.Error() != ErrParams.Error() {
				t.Fatalf("%v, %v", s, err)
			}
			return
		}
		if sel, err := ParseSelection(s.pcrs.String()); err != nil || len(s.values) != len(sel.pcrs) || len(sel.pcrs) == 0 {
			t.Fatalf("%v, %d values", sel, len(s.values))
		}
	})
}

// A selection that is read prints as what reads to the same; an error means the zero selection.
func FuzzParseSelection(f *testing.F) {
	f.Add("sha256:7")
	f.Add("sha384:11+0")
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := ParseSelection(s)
		if err != nil {
			if !sel.isZero() {
				t.Fatal("a selection and an error")
			}
			return
		}
		again, err := ParseSelection(sel.String())
		if err != nil || again.String() != sel.String() {
			t.Fatalf("%q printed as %q: %v", s, sel, err)
		}
	})
}
