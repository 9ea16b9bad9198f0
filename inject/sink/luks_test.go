//go:build linux

package sink

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// newKey makes a key for tests.
func newKey(epoch uint32, create bool) Key {
	octets := make([]byte, 32)
	rand.Read(octets)
	return Key{Name: "disk", Epoch: epoch, Create: create, Octets: func() []byte { return octets }, Subject: "11111111-2222-3333-4444-555555555555"}
}

func needCryptsetup(t testing.TB) {
	t.Helper()
	if _, err := findProgram(); err != nil {
		t.Skip("needs cryptsetup: apt-get install cryptsetup-bin")
	}
}

const testSize = 24 << 20

// blankDisk makes a file of zeros that stands for a disk.
func blankDisk(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, testSize); err != nil {
		t.Fatal(err)
	}
	return path
}

// prepare does all of Put but the mapping.
func prepare(t testing.TB, path string, k Key) (*header, bool, error) {
	t.Helper()
	l := &LUKS{Device: path, Mapper: "test"}
	v, err := l.look()
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	h, formatted, err := v.header(context.Background(), k)
	if err != nil {
		return nil, false, err
	}
	_, slot, err := h.keyslotFor(k)
	if err != nil {
		return nil, false, err
	}
	if err := v.head.use(h); err != nil {
		return nil, false, err
	}
	if err := v.head.seal(); err != nil {
		return nil, false, err
	}
	return h, formatted, testKey(context.Background(), v.program, v.head, path, slot, k.Octets())
}

// formatted makes a volume.
func formatted(t testing.TB, k Key) string {
	t.Helper()
	needCryptsetup(t)
	path := blankDisk(t)
	k.Create = true
	if _, made, err := prepare(t, path, k); err != nil || !made {
		t.Fatalf("formatting: %v, formatted %v", err, made)
	}
	return path
}

func cryptsetup(t testing.TB, key []byte, args ...string) string {
	t.Helper()
	c := exec.Command("cryptsetup", args...)
	c.Stdin = bytes.NewReader(key)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("cryptsetup %v: %v: %s", args, err, out)
	}
	return string(out)
}

func TestFormatsBlankAndOpensAgain(t *testing.T) {
	k := newKey(3, true)
	path := formatted(t, k)
	k.Create = false
	h, made, err := prepare(t, path, k)
	if err != nil || made {
		t.Fatalf("second time: %v, formatted %v", err, made)
	}
	if _, tok := h.newestToken(); tok.Name != "disk" || tok.Epoch != 3 || tok.Subject != k.Subject {
		t.Errorf("token %+v", tok)
	}
	// what is on the disk is what any other cryptsetup opens, from either copy of the header
	cryptsetup(t, k.Octets(), "open", "--test-passphrase", "--key-file", "-", path)
	if dump := cryptsetup(t, nil, "luksDump", path); !strings.Contains(dump, "keybroker") || !strings.Contains(dump, "16777216 [bytes]") {
		t.Errorf("luksDump: %s", dump)
	}
	wipe(t, path, 0, binarySize)
	if _, _, err := prepare(t, path, k); err != nil {
		t.Errorf("from the second copy: %v", err)
	}
}

func wipe(t testing.TB, path string, at, n int64) { overwrite(t, path, at, make([]byte, n)) }

func overwrite(t testing.TB, path string, at int64, octets []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(octets, at); err != nil {
		t.Fatal(err)
	}
}

func TestFormatsOnlyBlankAndOnlyWhenAllowed(t *testing.T) {
	needCryptsetup(t)
	one := []byte{1}
	cases := []struct {
		name   string
		spoil  func(path string)
		create bool
		want   error
	}{
		{"blank, not allowed", func(string) {}, false, ErrNoVolume},
		{"something at the start", func(p string) { overwrite(t, p, 1080, one) }, true, ErrNotBlank},
		{"something in the keyslots' area", func(p string) { overwrite(t, p, 9<<20, one) }, true, ErrNotBlank},
		{"something just before the data", func(p string) { overwrite(t, p, 16<<20-1, one) }, true, ErrNotBlank},
		{"something at the end", func(p string) { overwrite(t, p, testSize-1, one) }, true, ErrNotBlank},
		{"almost the marker", func(p string) { overwrite(t, p, 0, marker[:40]) }, true, ErrNotBlank},
		{"the marker, not allowed", func(p string) { overwrite(t, p, 0, marker) }, false, ErrNoVolume},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := blankDisk(t)
			c.spoil(path)
			before := content(t, path)
			if _, _, err := prepare(t, path, newKey(1, c.create)); !errors.Is(err, c.want) {
				t.Errorf("got %v, expected %v", err, c.want)
			}
			if !bytes.Equal(before, content(t, path)) {
				t.Error("the device was written to")
			}
		})
	}
}

func content(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTooSmall(t *testing.T) {
	needCryptsetup(t)
	path := blankDisk(t)
	if err := os.Truncate(path, 16<<20); err != nil {
		t.Fatal(err)
	}
	if _, _, err := prepare(t, path, newKey(1, true)); err == nil || !strings.Contains(err.Error(), "expected at least") {
		t.Errorf("got %v", err)
	}
}

// A crash between any two octets of a format leaves what the next start formats anew.
func TestFormatSurvivesCrash(t *testing.T) {
	k := newKey(1, true)
	final := content(t, formatted(t, k))[:2*minHeaderSize+formatKeyslots]
	other := newKey(1, true)
	for _, n := range []int{0, 1, 4096, minHeaderSize - binarySize, minHeaderSize, 2*minHeaderSize - binarySize, 2 * minHeaderSize, 100_000, len(final) - binarySize} {
		path := blankDisk(t)
		overwrite(t, path, 0, marker)
		overwrite(t, path, binarySize, final[binarySize:binarySize+n])
		if _, made, err := prepare(t, path, other); err != nil || !made {
			t.Errorf("crash after %d octets: %v, formatted %v", n, err, made)
		}
	}
	// the last write ends it: from then on it is a volume, and not formatted again
	path := blankDisk(t)
	overwrite(t, path, 0, final)
	if _, made, err := prepare(t, path, k); err != nil || made {
		t.Errorf("after the last write: %v, formatted %v", err, made)
	}
	if _, _, err := prepare(t, path, other); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
}

func TestEpochsAndNames(t *testing.T) {
	k := newKey(3, false)
	path := formatted(t, k)
	older, newer, foreign := k, k, k
	older.Epoch, newer.Epoch, foreign.Name = 2, 4, "other"
	if _, _, err := prepare(t, path, older); !errors.Is(err, ErrOldEpoch) {
		t.Errorf("older: %v", err)
	}
	var need *NeedEpochError
	if _, _, err := prepare(t, path, newer); !errors.As(err, &need) || need.Epoch != 3 {
		t.Errorf("newer: %v", err)
	}
	if _, _, err := prepare(t, path, foreign); !errors.Is(err, ErrHeader) {
		t.Errorf("another name: %v", err)
	}
}

func TestAdoptsVolumeWithoutToken(t *testing.T) {
	k := newKey(1, false)
	path := formatted(t, k)
	cryptsetup(t, nil, "token", "remove", "--token-id", "0", path)
	if _, _, err := prepare(t, path, k); !errors.Is(err, ErrHeader) || !strings.Contains(err.Error(), "token import") {
		t.Errorf("without create: %v", err)
	}
	if _, _, err := prepare(t, path, newKey(1, true)); !errors.Is(err, ErrNotBlank) {
		t.Errorf("another key: %v", err)
	}
	k.Create = true
	if _, made, err := prepare(t, path, k); err != nil || made {
		t.Fatalf("with create: %v, formatted %v", err, made)
	}
	k.Create = false
	if _, _, err := prepare(t, path, k); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if dump := cryptsetup(t, nil, "luksDump", path); !strings.Contains(dump, "0: keybroker") {
		t.Errorf("luksDump: %s", dump)
	}
}

func TestRekey(t *testing.T) {
	old, new := newKey(1, false), newKey(2, false)
	path := formatted(t, old)
	l := &LUKS{Device: path, Mapper: "test"}
	if err := l.Rekey(context.Background(), newKey(1, false), new); !errors.Is(err, ErrWrongKey) {
		t.Errorf("with a wrong old key: %v", err)
	}
	before := content(t, path)
	if err := l.Rekey(context.Background(), old, new); err != nil {
		t.Fatal(err)
	}
	h, _, err := prepare(t, path, new)
	if err != nil {
		t.Fatal(err)
	}
	if len(h.meta.Keyslots) != 1 || len(h.tokens) != 1 {
		t.Errorf("%d keyslots, %d tokens are left", len(h.meta.Keyslots), len(h.tokens))
	}
	cryptsetup(t, new.Octets(), "open", "--test-passphrase", "--key-file", "-", path)
	// the old keyslot's area is wiped
	first := make([]byte, 4096)
	copy(first, content(t, path)[2*minHeaderSize:])
	if !allZero(first) || allZero(before[2*minHeaderSize:2*minHeaderSize+4096]) {
		t.Error("the old keyslot is still on the disk")
	}
	if _, _, err := prepare(t, path, old); !errors.Is(err, ErrOldEpoch) {
		t.Errorf("the old key: %v", err)
	}
}

// A header update that was cut between its two copies, or within one, leaves the older or the newer one.
func TestUpdateSurvivesCrash(t *testing.T) {
	old, new := newKey(1, false), newKey(2, false)
	path := formatted(t, old)
	before := content(t, path)
	l := &LUKS{Device: path, Mapper: "test"}
	if err := l.Rekey(context.Background(), old, new); err != nil {
		t.Fatal(err)
	}
	after := content(t, path)
	opens := func(image []byte) bool {
		overwrite(t, path, 0, image[:4<<20])
		_, _, oldErr := prepare(t, path, old)
		_, _, newErr := prepare(t, path, new)
		return oldErr == nil || newErr == nil
	}
	for _, cut := range []int{0, 1, 512, 4096, minHeaderSize} {
		image := bytes.Clone(after) // the first copy of the last update is torn
		copy(image[cut:minHeaderSize], before[cut:minHeaderSize])
		if !opens(image) {
			t.Errorf("first copy cut at %d: neither key opens", cut)
		}
	}
}
