/* Runs for as many seconds as it is told, by whatever name it is called. */
#include <stdlib.h>
#include <unistd.h>

int main(int count, char **words) {
	return count == 2 ? (int)sleep(atoi(words[1])) : 1;
}
