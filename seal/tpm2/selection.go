package tpm2

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	gotpm "github.com/google/go-tpm/tpm2"
)

// maxPCR is the highest PCR that every PC platform has. See TCG PC Client Platform TPM Profile, section 4.6.
const maxPCR = 23

// A Selection is a bank of PCRs and some of its registers, as "sha256:7" or "sha256:0+7+11".
type Selection struct {
	bank string
	pcrs []int // ascending, unique, at least one
}

var banks = map[string]gotpm.TPMAlgID{
	"sha256": gotpm.TPMAlgSHA256,
	"sha384": gotpm.TPMAlgSHA384,
	"sha512": gotpm.TPMAlgSHA512,
}

// ParseSelection reads a bank, a colon, and PCR numbers from 0 to 23 joined by "+".
func ParseSelection(s string) (Selection, error) {
	bank, list, found := strings.Cut(s, ":")
	if !found {
		return Selection{}, fmt.Errorf("reading a PCR selection: want BANK:PCR[+PCR...], as sha256:7 or sha256:0+7+11, got %q", s)
	}
	var pcrs []int
	for number := range strings.SplitSeq(list, "+") {
		n, err := strconv.ParseUint(number, 10, 8)
		if err != nil || strconv.FormatUint(n, 10) != number {
			return Selection{}, fmt.Errorf("reading a PCR selection: want PCR numbers joined by +, got %q", list)
		}
		pcrs = append(pcrs, int(n))
	}
	return newSelection(bank, pcrs)
}

func newSelection(bank string, pcrs []int) (Selection, error) {
	if _, ok := banks[bank]; !ok {
		return Selection{}, fmt.Errorf("reading a PCR selection: want bank sha256, sha384 or sha512, got %q", bank)
	}
	pcrs = slices.Sorted(slices.Values(pcrs))
	switch {
	case len(pcrs) == 0:
		return Selection{}, errors.New("reading a PCR selection: it selects no PCR")
	case len(slices.Compact(slices.Clone(pcrs))) != len(pcrs):
		return Selection{}, errors.New("reading a PCR selection: a PCR is given twice")
	case pcrs[0] < 0 || pcrs[len(pcrs)-1] > maxPCR:
		return Selection{}, fmt.Errorf("reading a PCR selection: want PCRs from 0 to %d", maxPCR)
	}
	return Selection{bank: bank, pcrs: pcrs}, nil
}

// String returns the selection in the form that ParseSelection reads.
func (s Selection) String() string {
	numbers := make([]string, len(s.pcrs))
	for i, n := range s.pcrs {
		numbers[i] = strconv.Itoa(n)
	}
	return s.bank + ":" + strings.Join(numbers, "+")
}

func (s Selection) isZero() bool { return len(s.pcrs) == 0 }

// digestSize is the length of the bank's registers in octets.
func (s Selection) digestSize() int {
	h, err := banks[s.bank].Hash()
	if err != nil {
		return crypto.SHA256.Size()
	}
	return h.Size()
}

// list is the selection, or some of its PCRs, for a command.
func (s Selection) list(pcrs []int) gotpm.TPMLPCRSelection {
	numbers := make([]uint, len(pcrs))
	for i, n := range pcrs {
		numbers[i] = uint(n)
	}
	return gotpm.TPMLPCRSelection{PCRSelections: []gotpm.TPMSPCRSelection{{
		Hash:      banks[s.bank],
		PCRSelect: gotpm.PCClientCompatible.PCRs(numbers...),
	}}}
}
