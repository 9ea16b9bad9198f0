package seal

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

// DO NOT CHANGE: every realm file that exists depends on these octets.
func TestGolden(t *testing.T) {
	realm := RealmID{0xaa, 0xbb}
	check := RealmID{0xcc}
	id := SlotID{1, 2, 3, 4, 5, 6, 7, 8}
	share, err := NewKey(bytes.Repeat([]byte{7}, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"slot AAD", slotAAD(1, realm, 1, id, "tpm2", jsontext.Value(`{"a":1}`)),
			"000000116b657962726f6b65722f763120736c6f74" + "0000000400000001" + "00000010aabb0000000000000000000000000000" +
				"0000000400000001" + "000000080102030405060708" + "0000000474706d32" + "000000077b2261223a317d"},
		{"generation AAD", generationAAD(1, realm, 2, check),
			"0000001d6b657962726f6b65722f7631207265616c6d2067656e65726174696f6e" + "0000000400000001" +
				"00000010aabb0000000000000000000000000000" + "0000000400000002" + "00000010cc000000000000000000000000000000"},
		{"generation info", []byte(generationInfo(realm, 2)),
			"00" + "0000001d6b657962726f6b65722f7631207265616c6d2067656e65726174696f6e" +
				"00000010aabb0000000000000000000000000000" + "0000000400000002"},
		{"mac info", []byte(macInfo(realm)),
			"00" + "000000166b657962726f6b65722f7631207265616c6d206d6163" + "00000010aabb0000000000000000000000000000"},
		{"mac input", macInput([]byte("{}")), "000000166b657962726f6b65722f7631207265616c6d206d6163" + "000000027b7d"},
		{"sum input", sumInput([]byte("{}")), "000000166b657962726f6b65722f7631207265616c6d2073756d" + "000000027b7d"},
		{"generation key", expand(share, generationInfo(realm, 2)).Octets(), "8d1e2258a2c69bc34d10375ff941458978859dbf5677a0a1dd7105d30568ec64"},
		{"mac", fileMAC(share, realm, []byte("{}")), "050fe28e0c29d92dcdff1f8ff9ccb913e4dda2f6a6a657ceda99cb54a63be55a"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s is %s, want %s", c.name, got, c.want)
		}
	}
}
