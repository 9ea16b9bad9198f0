package derive

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
)

// Kinds of secret page, as PageKind tells them.
const (
	// PageSecret is memory that the kernel itself has no mapping of: not in dumps, not in swap, not in /proc/PID/mem.
	PageSecret = "memfd_secret"
	// PageMemfd is ordinary memory without a name, for kernels that have no memfd_secret. While no process has it mapped
	// and locked it can be swapped out, and root can read it.
	PageMemfd = "memfd"
)

// MaxGenerations is how many generations a page can hold.
const MaxGenerations = 64

// Errors about the secret page that callers match.
var (
	// ErrEmptyPage means that nobody has filled the page: no slot was opened.
	ErrEmptyPage = errors.New("the secret page is empty: the realm was not opened")
	// ErrForeignPage means that the descriptor is no page of ours or that its contents are damaged.
	ErrForeignPage = errors.New("this is not a secret page of keybroker")
	// ErrPageFilled means that the page was filled before; it is filled once.
	ErrPageFilled = errors.New("the secret page is already filled")
)

// The page's layout, integers big-endian: magic 16, version 4, count 4, realm id 16, count times a PRK of 32 octets in the
// order of generations, SHA-256 of all before it 32, zero octets to the end.
const (
	pageSize    = 4096
	pageMagic   = "keybroker page\r\n"
	pageVersion = 1
	pageCountAt = len(pageMagic) + 4
	pageRealmAt = pageCountAt + 4
	pagePRKAt   = pageRealmAt + RealmIDSize
)

// fillPage writes the page of a realm with these masters into page, which must be all zero.
func fillPage(page []byte, masters []Master) error {
	if len(masters) < 1 || len(masters) > MaxGenerations {
		return fmt.Errorf("a realm has 1 to %d generations, not %d", MaxGenerations, len(masters))
	}
	if !isZero(page) {
		return ErrPageFilled
	}
	for i, m := range masters {
		if err := fillGeneration(page, i, m); err != nil {
			clear(page)
			return fmt.Errorf("generation %d: %w", i+1, err)
		}
	}
	copy(page, pageMagic)
	binary.BigEndian.PutUint32(page[len(pageMagic):], pageVersion)
	binary.BigEndian.PutUint32(page[pageCountAt:], uint32(len(masters)))
	end := pagePRKAt + len(masters)*prkSize
	sum := sha256.Sum256(page[:end])
	copy(page[end:], sum[:])
	return nil
}

func fillGeneration(page []byte, i int, m Master) error {
	octets, err := m.Octets()
	if err != nil {
		return err
	}
	prk, err := extract(octets)
	if err != nil {
		return err
	}
	defer clear(prk)
	copy(page[pagePRKAt+i*prkSize:], prk)
	if i > 0 {
		return nil
	}
	id, err := expand(prk, RealmIDInfo(), RealmIDSize)
	copy(page[pageRealmAt:], id)
	return err
}

// parsePage checks a page and returns its PRKs in the order of generations, in place: nothing secret is copied.
func parsePage(page []byte) (RealmID, [][]byte, error) {
	if isZero(page) {
		return RealmID{}, nil, ErrEmptyPage
	}
	if len(page) != pageSize || !bytes.HasPrefix(page, []byte(pageMagic)) {
		return RealmID{}, nil, ErrForeignPage
	}
	if v := binary.BigEndian.Uint32(page[len(pageMagic):]); v != pageVersion {
		return RealmID{}, nil, fmt.Errorf("%w of this release: its version is %d, not %d", ErrForeignPage, v, pageVersion)
	}
	count := binary.BigEndian.Uint32(page[pageCountAt:])
	if count < 1 || count > MaxGenerations {
		return RealmID{}, nil, fmt.Errorf("%w: it has %d generations", ErrForeignPage, count)
	}
	end := pagePRKAt + int(count)*prkSize
	sum := sha256.Sum256(page[:end])
	if subtle.ConstantTimeCompare(sum[:], page[end:end+len(sum)]) != 1 || !isZero(page[end+len(sum):]) {
		return RealmID{}, nil, fmt.Errorf("%w: it is damaged", ErrForeignPage)
	}
	prks := make([][]byte, count)
	for i := range prks {
		prks[i] = page[pagePRKAt+i*prkSize : pagePRKAt+(i+1)*prkSize]
	}
	return RealmID(page[pageRealmAt:pagePRKAt]), prks, nil
}

func isZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }
