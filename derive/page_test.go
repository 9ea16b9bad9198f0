package derive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"
)

func filledPage(t testing.TB, masters ...Master) []byte {
	t.Helper()
	page := make([]byte, pageSize)
	if err := fillPage(page, masters); err != nil {
		t.Fatal(err)
	}
	return page
}

// Every octet of a page counts.
func TestDamagedPage(t *testing.T) {
	good := filledPage(t, testMaster(t, 0), testMaster(t, 1))
	for i := range good {
		page := bytes.Clone(good)
		page[i] ^= 0x40
		realm, prks, err := parsePage(page)
		if !errors.Is(err, ErrForeignPage) || prks != nil || realm != (RealmID{}) {
			t.Fatalf("octet %d changed: %v", i, err)
		}
	}
	for _, n := range []int{0, 1, 100, pageSize - 1} {
		if _, prks, err := parsePage(good[:n]); err == nil || prks != nil {
			t.Errorf("%d octets of a page were accepted", n)
		}
	}
}

// A page whose realm id is not its own is one that somebody made.
func TestPageOfAnotherRealm(t *testing.T) {
	page := filledPage(t, testMaster(t, 0))
	page[pageRealmAt] ^= 1
	resum(page, 1)
	if k, err := newKeyring(page); !errors.Is(err, ErrForeignPage) || k != nil {
		t.Errorf("accepted: %v", err)
	}
}

func resum(page []byte, count int) {
	end := pagePRKAt + count*prkSize
	sum := sha256.Sum256(page[:end])
	copy(page[end:], sum[:])
}

func FuzzParsePage(f *testing.F) {
	good := filledPage(f, testMaster(f, 0), testMaster(f, 1))
	f.Add(good, false)
	f.Add(good[:pagePRKAt], true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, start []byte, sum bool) {
		page := make([]byte, pageSize)
		copy(page, start)
		// With a checksum that fits, the other checks are reached.
		if n := binary.BigEndian.Uint32(page[pageCountAt:]); sum && n <= MaxGenerations {
			resum(page, int(n))
		}
		_, prks, err := parsePage(page)
		if (err == nil) != (len(prks) > 0) {
			t.Fatalf("%d generations, %v", len(prks), err)
		}
		for i, prk := range prks {
			if len(prk) != prkSize || !bytes.Equal(prk, page[pagePRKAt+i*prkSize:][:prkSize]) {
				t.Fatalf("generation %d is not where it was written", i+1)
			}
		}
	})
}
