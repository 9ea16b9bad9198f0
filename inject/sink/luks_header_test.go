//go:build linux

package sink

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"strings"
	"testing"
)

// rewrite changes a volume's metadata as a host may: both copies, with a right checksum.
func rewrite(t testing.TB, path string, change func(meta map[string]any)) {
	t.Helper()
	raw := content(t, path)
	for _, at := range []uint64{0, minHeaderSize} {
		document, _, _ := bytes.Cut(raw[at+binarySize:at+minHeaderSize], []byte{0})
		var meta map[string]any
		if err := json.Unmarshal(document, &meta); err != nil {
			t.Fatal(err)
		}
		change(meta)
		text, err := json.Marshal(meta)
		if err != nil {
			t.Fatal(err)
		}
		area := make([]byte, minHeaderSize-binarySize)
		copy(area, text)
		overwriteCopy(t, path, at, raw[at:at+binarySize], area)
	}
}

func overwriteCopy(t testing.TB, path string, at uint64, first, area []byte) {
	t.Helper()
	copy(first[checksumAt:], make([]byte, 64))
	copy(first[checksumAt:], checksum(first, area))
	overwrite(t, path, int64(at), first)
	overwrite(t, path, int64(at)+binarySize, area)
}

// dig walks into metadata by names.
func dig(meta map[string]any, names ...string) map[string]any {
	for _, n := range names {
		meta = meta[n].(map[string]any)
	}
	return meta
}

func TestRewrittenHeadersAreRefused(t *testing.T) {
	k := newKey(1, false)
	pristine := content(t, formatted(t, k))
	set := func(value any, path ...string) func(map[string]any) {
		return func(m map[string]any) { dig(m, path[:len(path)-1]...)[path[len(path)-1]] = value }
	}
	cases := map[string]func(map[string]any){
		"null cipher in the segment":   set("cipher_null-ecb", "segments", "0", "encryption"),
		"null cipher in the keyslot":   set("cipher_null-ecb", "keyslots", "0", "area", "encryption"),
		"another cipher":               set("aes-cbc-essiv:sha256", "segments", "0", "encryption"),
		"short volume key":             set(32, "keyslots", "0", "key_size"),
		"short area key":               set(32, "keyslots", "0", "area", "key_size"),
		"changed kdf":                  set("argon2i", "keyslots", "0", "kdf", "type"),
		"kdf without end":              set(4_000_000_000, "keyslots", "0", "kdf", "iterations"),
		"kdf with one round":           set(1, "keyslots", "0", "kdf", "iterations"),
		"kdf that eats the memory":     set(map[string]any{"type": "argon2id", "time": 4, "memory": 64 << 20, "cpus": 4, "salt": "AAAA"}, "keyslots", "0", "kdf"),
		"kdf of two kinds":             set(65536, "keyslots", "0", "kdf", "memory"),
		"kdf hash":                     set("md5", "keyslots", "0", "kdf", "hash"),
		"no stripes":                   set(1, "keyslots", "0", "af", "stripes"),
		"keyslot area in the data":     set("20971520", "keyslots", "0", "area", "offset"),
		"keyslot area in the header":   set("4096", "keyslots", "0", "area", "offset"),
		"keyslot area without end":     set("18446744073709547520", "keyslots", "0", "area", "size"),
		"keyslot of another type":      set("reencrypt", "keyslots", "0", "type"),
		"keyslot with a priority":      set(0, "keyslots", "0", "priority"),
		"no keyslot":                   func(m map[string]any) { clear(dig(m, "keyslots")) },
		"segment not to the end":       set("1048576", "segments", "0", "size"),
		"segment in the keyslots":      set("32768", "segments", "0", "offset"),
		"segment beyond the end":       set("1099511627776", "segments", "0", "offset"),
		"segment with iv_tweak":        set("8", "segments", "0", "iv_tweak"),
		"segment linear":               set("linear", "segments", "0", "type"),
		"segment with integrity":       set(map[string]any{"type": "none"}, "segments", "0", "integrity"),
		"segment with flags":           set([]string{"backup-final"}, "segments", "0", "flags"),
		"sectors of 1024":              set(1024, "segments", "0", "sector_size"),
		"extra segment":                func(m map[string]any) { dig(m, "segments")["1"] = maps.Clone(dig(m, "segments", "0")) },
		"segment 1 only":               func(m map[string]any) { s := dig(m, "segments"); s["1"] = s["0"]; delete(s, "0") },
		"extra digest":                 func(m map[string]any) { dig(m, "digests")["1"] = maps.Clone(dig(m, "digests", "0")) },
		"digest without the segment":   set([]string{}, "digests", "0", "segments"),
		"digest without the keyslot":   set([]string{}, "digests", "0", "keyslots"),
		"digest with one round":        set(1, "digests", "0", "iterations"),
		"digest hash":                  set("md5", "digests", "0", "hash"),
		"foreign token":                set(map[string]any{"type": "systemd-tpm2", "keyslots": []string{"0"}}, "tokens", "1"),
		"foreign token in our form":    set("clevis", "tokens", "0", "type"),
		"our token with more in it":    set("x", "tokens", "0", "plugin"),
		"token for no keyslot":         set([]string{"7"}, "tokens", "0", "keyslots"),
		"token without an epoch":       set(0, "tokens", "0", "epoch"),
		"two tokens of an epoch":       func(m map[string]any) { dig(m, "tokens")["1"] = maps.Clone(dig(m, "tokens", "0")) },
		"reencryption":                 set(map[string]any{"mandatory": []string{"online-reencrypt-v2"}}, "config", "requirements"),
		"requirement without a name":   set(map[string]any{"mandatory": []string{}}, "config", "requirements"),
		"flag for discards":            set([]string{"allow-discards"}, "config", "flags"),
		"flag that nobody knows":       set([]string{"no-encryption"}, "config", "flags"),
		"metadata of another size":     set("16384", "config", "json_size"),
		"keyslots beyond the data":     set("16777216", "config", "keyslots_size"),
		"keyslots without end":         set("18446744073709547520", "config", "keyslots_size"),
		"member that nobody knows":     set(true, "insecure"),
		"number where text belongs":    set(12288, "config", "json_size"),
		"mis-cased member":             set("crypt", "segments", "0", "Type"),
		"token with a huge epoch":      set(1<<40, "tokens", "0", "epoch"),
		"token of a name with escapes": set("a\x1b[2J", "tokens", "0", "name"),
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			path := blankDisk(t)
			overwrite(t, path, 0, pristine[:4<<20])
			rewrite(t, path, change)
			_, _, err := prepare(t, path, k)
			if !errors.Is(err, ErrHeader) {
				t.Fatalf("got %v, expected a refusal", err)
			}
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
				t.Errorf("not fit for a console: %q", err)
			}
		})
	}
	t.Run("unchanged", func(t *testing.T) {
		path := blankDisk(t)
		overwrite(t, path, 0, pristine[:4<<20])
		rewrite(t, path, func(map[string]any) {})
		if _, _, err := prepare(t, path, k); err != nil {
			t.Fatal(err)
		}
	})
}

func TestHeadersOfOtherForms(t *testing.T) {
	k := newKey(1, true)
	pristine := content(t, formatted(t, k))[:4<<20]
	area := bytes.Clone(pristine[binarySize:minHeaderSize])
	document, _, _ := bytes.Cut(area, []byte{0})
	both := func(image []byte, first func(b []byte), text []byte) {
		for _, at := range []int{0, minHeaderSize} {
			raw := image[at : at+binarySize]
			first(raw)
			copy(image[at+binarySize:], text)
			copy(raw[checksumAt:], make([]byte, 64))
			copy(raw[checksumAt:], checksum(raw, text))
		}
	}
	keep := func([]byte) {}
	cases := map[string]func(image []byte){
		"LUKS1":                     func(b []byte) { b[7] = 1; clear(b[minHeaderSize : minHeaderSize+6]) },
		"both checksums wrong":      func(b []byte) { b[binarySize+1] ^= 1; b[minHeaderSize+binarySize+1] ^= 1 },
		"sha1 as the checksum":      func(b []byte) { both(b, func(raw []byte) { copy(raw[72:], "sha1\x00\x00\x00") }, area) },
		"a copy without end":        func(b []byte) { both(b, func(raw []byte) { raw[8] = 0xff }, area) },
		"UUID that is none":         func(b []byte) { both(b, func(raw []byte) { raw[168] = '/' }, area) },
		"something behind the JSON": func(b []byte) { x := bytes.Clone(area); x[len(x)-1] = 1; both(b, keep, x) },
		"a repeated member":         func(b []byte) { both(b, keep, padded(area, `{"config":{},`+string(document[1:]))) },
		"bad UTF-8": func(b []byte) {
			both(b, keep, padded(area, strings.Replace(string(document), "disk", "di\xff\xfe", 1)))
		},
		"two copies that contradict": func(b []byte) { contradict(b) },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			path, image := blankDisk(t), bytes.Clone(pristine)
			spoil(image)
			overwrite(t, path, 0, image)
			if _, _, err := prepare(t, path, k); !errors.Is(err, ErrHeader) {
				t.Errorf("got %v, expected a refusal", err)
			}
		})
	}
}

func padded(area []byte, document string) []byte {
	out := make([]byte, len(area))
	copy(out, document)
	return out
}

// contradict gives the second copy another token under the same number.
func contradict(image []byte) {
	raw, area := image[minHeaderSize:minHeaderSize+binarySize], image[minHeaderSize+binarySize:2*minHeaderSize]
	copy(area, bytes.Replace(bytes.Clone(area), []byte(`"name":"disk"`), []byte(`"name":"dusk"`), 1))
	copy(raw[checksumAt:], make([]byte, 64))
	copy(raw[checksumAt:], checksum(raw, area))
}

func TestPins(t *testing.T) {
	k := newKey(1, false)
	path := formatted(t, k)
	k.Pins = HeaderPins{Cipher: "aes-xts-plain64", KeySize: 512}
	if _, _, err := prepare(t, path, k); err != nil {
		t.Errorf("as it is: %v", err)
	}
	for _, pins := range []HeaderPins{{Cipher: "serpent-xts-plain64"}, {KeySize: 256}, {SectorSize: 1 << 20}} {
		k.Pins = pins
		if _, _, err := prepare(t, path, k); !errors.Is(err, ErrHeader) {
			t.Errorf("%+v: got %v, expected a refusal", pins, err)
		}
	}
}

// The host may change the disk between two reads: nothing is read twice.
func TestEveryOctetIsReadOnce(t *testing.T) {
	k := newKey(1, false)
	image := content(t, formatted(t, k))
	once := &onceReader{t: t, b: bytes.NewReader(image), seen: make([]bool, len(image))}
	head, err := newSnapshot(once, int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	defer head.Close()
	h, err := readHeader(head)
	if err != nil {
		t.Fatal(err)
	}
	if err := head.use(h); err != nil {
		t.Fatal(err)
	}
}

type onceReader struct {
	t    *testing.T
	b    io.ReaderAt
	seen []bool
}

func (o *onceReader) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		if o.seen[int(off)+i] {
			o.t.Fatalf("octet %d is read twice", int(off)+i)
		}
		o.seen[int(off)+i] = true
	}
	return o.b.ReadAt(p, off)
}

// What cryptsetup is given holds no token and nothing else that was not understood.
func TestUsedCopyIsRendered(t *testing.T) {
	k := newKey(1, false)
	path := formatted(t, k)
	cryptsetup(t, nil, "config", "--label", "from-the-host", path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head, err := newSnapshot(f, testSize)
	if err != nil {
		t.Fatal(err)
	}
	defer head.Close()
	h, err := readHeader(head)
	if err != nil {
		t.Fatal(err)
	}
	if err := head.use(h); err != nil {
		t.Fatal(err)
	}
	used := make([]byte, 2*minHeaderSize)
	if _, err := head.memory.ReadAt(used, 0); err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{"from-the-host", "keybroker", "disk"} {
		if bytes.Contains(used, []byte(gone)) {
			t.Errorf("%q is in the copy", gone)
		}
	}
	if err := head.seal(); err != nil {
		t.Fatal(err)
	}
	if _, err := head.memory.WriteAt([]byte{0}, 0); err == nil {
		t.Error("the sealed copy can be written to")
	}
}

func TestKeyIsNotPrinted(t *testing.T) {
	k := newKey(1, false)
	secret := "key octets that nobody may see.."
	k.Octets = func() []byte { return []byte(secret) }
	path := formatted(t, newKey(1, false))
	_, _, err := prepare(t, path, k)
	if err == nil || strings.Contains(err.Error(), secret) {
		t.Errorf("error %v", err)
	}
}

func FuzzMetadata(f *testing.F) {
	k := newKey(1, false)
	image := content(f, formatted(f, k))
	document, _, _ := bytes.Cut(image[binarySize:minHeaderSize], []byte{0})
	f.Add(document)
	f.Add([]byte(`{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{"json_size":"12288","keyslots_size":"0"}}`))
	b := &binaryHeader{Version: 2, Size: minHeaderSize, Sequence: 1}
	copy(b.UUID[:], "11111111-2222-3333-4444-555555555555")
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := parseHeader(b, text)
		if err != nil {
			if h != nil || !errors.Is(err, ErrHeader) {
				t.Fatalf("an error with a header, or of another kind: %v", err)
			}
			return
		}
		// what was understood, rendered and read again, is understood alike
		again, err := parseHeader(b, h.json())
		if err != nil || !bytes.Equal(again.json(), h.json()) {
			t.Fatalf("read again: %v", err)
		}
		if h.check(HeaderPins{}, testSize) == nil {
			s := h.meta.Segments["0"]
			if len(h.meta.Segments) != 1 || s.Encryption != allowedCipher || s.Size != "dynamic" || len(h.meta.Config.Requirements) != 0 {
				t.Fatalf("accepted %s", h.json())
			}
			for _, slot := range h.meta.Keyslots {
				if slot.Area.Encryption != allowedCipher || slot.Area.Offset < 2*h.size || slot.Area.Offset+slot.Area.Size > s.Offset {
					t.Fatalf("accepted %s", h.json())
				}
			}
		}
	})
}

// FuzzHeader gives octets for the first of the binary part and of the metadata; right: with the checksum that fits them.
func FuzzHeader(f *testing.F) {
	image := content(f, formatted(f, newKey(1, false)))
	document, _, _ := bytes.Cut(image[binarySize:minHeaderSize], []byte{0})
	f.Add(image[:264], document, true)
	f.Add(image[minHeaderSize:minHeaderSize+264], document, true)
	f.Add(image[:264], document[:100], false)
	f.Fuzz(func(t *testing.T, first, text []byte, right bool) {
		image := make([]byte, 2*minHeaderSize)
		copy(image[:checksumAt], first)
		copy(image[binarySize:minHeaderSize], text)
		if right {
			copy(image[checksumAt:], checksum(image[:binarySize], image[binarySize:minHeaderSize]))
		}
		copy(image[minHeaderSize:], image[:minHeaderSize])
		h, err := readHeader(bytes.NewReader(image))
		if (err == nil) == (h == nil) {
			t.Fatalf("header %v with error %v", h, err)
		}
		if err == nil && !right {
			t.Fatal("a wrong checksum is accepted")
		}
		if err != nil && !errors.Is(err, ErrHeader) && !errors.Is(err, errNoHeader) {
			t.Fatalf("an error of another kind: %v", err)
		}
	})
}
