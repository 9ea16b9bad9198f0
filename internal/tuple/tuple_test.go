package tuple

import (
	"bytes"
	"encoding/hex"
	"slices"
	"testing"
)

// DO NOT CHANGE: every key and signature depends on these octets.
func TestEncodeGolden(t *testing.T) {
	for _, c := range []struct {
		fields [][]byte
		want   string
	}{
		{nil, ""},
		{[][]byte{nil}, "00000000"},
		{[][]byte{[]byte("a"), []byte("bc")}, "00000001" + "61" + "00000002" + "6263"},
		{[][]byte{Uint32(0x01020304)}, "00000004" + "01020304"},
	} {
		if got := hex.EncodeToString(Encode(c.fields...)); got != c.want {
			t.Errorf("Encode(%q) = %s, want %s", c.fields, got, c.want)
		}
	}
}

// Two different pairs never encode alike, and encodings concatenate.
func FuzzEncode(f *testing.F) {
	f.Add([]byte("a"), []byte("bc"), []byte("ab"), []byte("c"))
	f.Add([]byte{}, []byte{0, 0, 0, 0}, []byte{0, 0, 0, 0}, []byte{})
	f.Fuzz(func(t *testing.T, a, b, c, d []byte) {
		same := bytes.Equal(a, c) && bytes.Equal(b, d)
		if got := bytes.Equal(Encode(a, b), Encode(c, d)); got != same {
			t.Fatalf("Encode(%x, %x) equal to Encode(%x, %x): %v", a, b, c, d, got)
		}
		if !bytes.Equal(Encode(a, b), slices.Concat(Encode(a), Encode(b))) {
			t.Fatal("encodings do not concatenate")
		}
	})
}
